"""Names that vLLM and FastDeploy have for settings: both doors read them from one table, and say what has no meaning here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.aliases import ALIASES, BY_KEYWORD, Kind, page
from cluster.cli import make_parser
from cluster.commands.flags import config_from
from cluster.config import ClusterConfig
from cluster.llm import LLM
from workers.errors import InvalidConfig

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models" / "ernie-4.5-tiny")


def serve(*flags: str) -> ClusterConfig:
    return config_from(make_parser().parse_args(["serve", "--model", MODEL, *flags]), {})


def at(config: Any, setting: str) -> Any:
    for name in setting.split("."):
        config = getattr(config, name)
    return config


SAID: dict[str, tuple[str, Any]] = {
    "tensor-parallel-size": ("2", 2),
    "max-model-len": ("4k", 4000),
    "max-num-seqs": ("8", 8),
    "max-num-batched-tokens": ("256", 256),
    "gpu-memory-utilization": ("0.5", 0.5),
    "num-gpu-blocks-override": ("1024", 1024 * 64 * 1024),
    "served-model-name": ("ernie", "ernie"),
    "reasoning-parser": ("ernie-x1", "ernie-x1"),
    "tool-call-parser": ("hermes", "hermes"),
    "swap-space": ("0.5", 1 << 29),
    "enable-prefix-caching": ("", True),
    "enable-expert-parallel": ("", 1),
    "device": ("cpu", "cpu"),
    "revision": ("v2", "v2"),
    "download-dir": ("/tmp/d", "/tmp/d"),
    "allowed-origins": ('["https://a.example"]', ("https://a.example",)),
    "allowed-methods": ('["POST"]', ("POST",)),
    "allowed-headers": ('["authorization"]', ("authorization",)),
    "root-path": ("/v", "/v"),
    "uds": ("/tmp/s", "/tmp/s"),
    "ssl-certfile": ("/tmp/c", "/tmp/c"),
    "access-log": ("text", "text"),
    "access-log-file": ("/tmp/l", "/tmp/l"),
    "timeout-keep-alive": ("75", 75.0),
    "shutdown-timeout": ("5", 5.0),
    "timeout-graceful-shutdown": ("5", 5.0),
    "api-server-count": ("2", 2),
    "workers": ("2", 2),
    "max-concurrency": ("512", 512),
    "max-logprobs": ("64", 64),
    "otlp-traces-endpoint": ("http://c:4318", "http://c:4318"),
    "kv-offloading-size": ("1", 1 << 30),
}
"""What each is given, and what its setting then is; the pool of the shipped model has 1 KiB a token and layer pair."""
ELSEWHERE = {"ssl-keyfile", "override-generation-config", "num-gpu-blocks-override"}
"""Looked at below."""


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if alias.kind is Kind.SETS], ids=lambda alias: alias.name)
def test_a_flag_that_stands_for_a_setting_sets_it(alias: Any) -> None:
    if alias.name in ELSEWHERE:
        return
    text, value = SAID[alias.name]
    for name in {alias.name, alias.keyword if not alias.is_switch else alias.name}:
        config = serve(f"--{name}", *filter(None, [text]))
        assert at(config, alias.what) == value


def test_flags_of_both_servers_go_together_and_ours_win() -> None:
    config = serve(
        "-tp",
        "2",
        "--enable-expert-parallel",
        "--max-model-len",
        "auto",
        "--dtype",
        "auto",
        "--no-enable-prefix-caching",
    )
    assert (config.worker.parallel.expert_parallel, config.worker.max_model_len) == (2, 0)
    assert config.worker.dtype == "float32" and not config.worker.prefix_cache
    assert serve("--max-num-seqs", "8", "--set", "worker.max_num_seqs=4").worker.max_num_seqs == 4
    generation = serve("--override-generation-config", '{"temperature": 0.5}')
    assert generation.router.api.sampling_defaults.temperature == 0.5
    assert serve("--ssl-certfile", "a", "--ssl-keyfile", "b").router.key_file == "b"
    float32, bfloat16 = (
        serve("--num-gpu-blocks-override", "16", "--dtype", dtype).worker.kv_memory_bytes
        for dtype in ("float", "bfloat16")
    )
    assert float32 == 2 * bfloat16 > 0


@pytest.mark.parametrize(
    "alias", [alias for alias in ALIASES if alias.kind is not Kind.SETS], ids=lambda alias: alias.name
)
def test_what_has_no_meaning_here_says_so_at_both_doors(alias: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if alias.is_switch else ["something"]
    if alias.kind is Kind.TOLD:
        serve(f"--{alias.name}", *given)
        assert f"{alias.name} changes nothing here: {alias.what}" in capsys.readouterr().err
        with (
            pytest.warns(UserWarning, match=f"{alias.name} changes nothing"),
            pytest.raises(InvalidConfig, match="folder"),
        ):
            LLM("/nowhere", **{alias.keyword: True})
        return
    with pytest.raises(InvalidConfig, match=f"{alias.name} .* cannot be had"):
        serve(f"--{alias.name}", *given)
    with pytest.raises(InvalidConfig, match=f"{alias.name} .* cannot be had"):
        LLM(MODEL, **{alias.keyword: True if alias.is_switch else "something"})
    for value in alias.same:
        if not alias.is_switch:
            serve(f"--{alias.name}", str(value))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--allowed-origins", "[x"), "'[x' is no list in JSON"),
        (("--swap-space", "inf"), "'inf' is no number of GiB"),
        (("--kv-offloading-size", "1e308"), "'1e308' is no number of GiB"),
        (("--kv-cache-dtype", "bfloat16"), "kv-cache-dtype 'bfloat16' cannot be had"),
        (("--kv-cache-dtype", "fp8", "--dtype", "bfloat16"), "kv-cache-dtype 'fp8' cannot be had"),
    ],
)
def test_what_a_value_cannot_be_is_one_sentence(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        serve(*flags)


def test_the_type_of_kv_may_be_named_as_it_is() -> None:
    for dtype in ("float32", "bfloat16"):
        assert serve("--kv-cache-dtype", dtype, "--set", f"worker.dtype={dtype}").worker.dtype == dtype
    with pytest.raises(InvalidConfig, match="kv-cache-dtype"):
        LLM(MODEL, kv_cache_dtype="bfloat16")


def test_an_offline_llm_takes_the_same_names() -> None:
    with pytest.warns(UserWarning, match=r"router\.api\.reasoning_parser is of a cluster"):
        llm = LLM(
            MODEL, dtype="auto", max_model_len=None, tensor_parallel_size=1, num_gpu_blocks_override=128, max_num_seqs=4,
            quantization=None, reasoning_parser="ernie-x1",
        )  # fmt: skip
    assert (llm._config.max_num_seqs, llm._config.kv_memory_bytes) == (4, 128 * (256 << 10))
    with pytest.raises(InvalidConfig, match="dtype 'half'"):
        LLM(MODEL, dtype="half")


def test_the_page_is_written_from_the_table() -> None:
    assert (ROOT / "docs" / "aliases.md").read_text() == page(), "run `python -m cluster.aliases > docs/aliases.md`"
    assert len(BY_KEYWORD) == len(ALIASES)
