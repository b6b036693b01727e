"""Settings from files, flags and --set; what is wrong is said with the place and a way out."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cluster.actors.pools import Pools
from cluster.config import ClusterConfig, load_config, schema
from cluster.settings import build
from router.config import hashed
from workers.errors import InvalidConfig
from workers.request import SamplingParams, ThinkingBudget
from workers.status import Role

MODEL = {"worker.model": "m"}


def load(*assignments: str, **flags: Any) -> ClusterConfig:
    return load_config(None, {**MODEL, **flags}, assignments)


def test_flags_win_over_the_file_and_set_wins_over_both(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("worker: {model: m, max_num_seqs: 1, max_queue: 1, max_batch_tokens: 1}\n")
    flags = {"worker.max_queue": 2, "worker.max_batch_tokens": 2, "worker.dtype": None}
    worker = load_config(file, flags, ["worker.max_batch_tokens=3"]).worker
    assert (worker.max_num_seqs, worker.max_queue, worker.max_batch_tokens) == (1, 2, 3)
    assert worker.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "worker:\n  model: m\npools:\n  decode: 3\n"),
        ("a.json", '{"worker": {"model": "m"}, "pools": {"decode": 3}}'),
        ("a.toml", '[worker]\nmodel = "m"\n[pools]\ndecode = 3\n'),
    ],
)
def test_three_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert load_config(tmp_path / name, {}).pools.decode == 3


def test_texts_become_what_the_setting_is() -> None:
    config = load(
        "worker.kv_memory_bytes=64MiB",
        "worker.transports=grpc",
        "worker.prefix_cache=off",
        "store.lease_ttl_s=2.5",
        "router.api.api_keys=a, b",
        "router.api.sampling_defaults.seed=none",
        "router.api.sampling_defaults.logit_bias=[[5, 0.5]]",
    )
    assert config.worker.kv_memory_bytes == 64 * 2**20
    assert config.worker.transports == ("grpc",)
    assert config.worker.prefix_cache is False
    assert config.store.lease_ttl_s == 2.5
    assert config.router.api.api_keys == (hashed("a"), hashed("b"))
    assert config.router.api.sampling_defaults.seed is None
    assert config.router.api.sampling_defaults.logit_bias == ((5, 0.5),)


def test_the_router_reads_the_workers_model_unless_it_names_its_own() -> None:
    assert load().router.model == "m"
    assert load("router.model=n").router.model == "n"


def test_workers_are_named_by_pool_and_routers_get_ports_of_their_own() -> None:
    config = load("pools.prefill=2", "pools.mixed=1", "pools.routers=2")
    assert config.pools.workers == (
        ("prefill-0", Role.PREFILL),
        ("prefill-1", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("mixed-0", Role.MIXED),
    )
    assert [config.router_at(at).port for at in range(2)] == [8000, 8001]
    assert load("router.port=0").router_at(1).port == 0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("worker.max_num_seq=3", "unknown setting worker.max_num_seq; did you mean worker.max_num_seqs?"),
        ("wroker.dtype=float32", "unknown setting wroker; did you mean worker?"),
        ("qqq=1", "unknown setting qqq; known here: worker, router, pools"),
        ("worker.max_num_seqs=many", "worker.max_num_seqs must be a whole number; it is 'many'"),
        ("worker.max_num_seqs=2GiB", "worker.max_num_seqs must be a whole number"),
        ("worker.max_num_seqs=0", "worker.max_num_seqs must be at least 1"),
        ("worker.transfer_timeout_s=soon", "worker.transfer_timeout_s must be a number; it is 'soon'"),
        ("worker.prefix_cache=maybe", "worker.prefix_cache must be true or false"),
        ("worker=5", "worker must be a group of settings"),
        ("store.url=etcd://x", "store.url must be memory, redis"),
        ("store.cluster=a b", "store.cluster takes letters"),
        ("pools.prefill=0", "no worker could prefill"),
        ("ray.object_store_bytes=1MiB", "ray.object_store_bytes must be at least"),
        ("ray.worker_gpus=0", "ray.worker_gpus must be above 0"),
        ("worker.dtype=int8", "worker.dtype must be 'float32' or 'bfloat16'; it is 'int8'"),
        ("worker.kv_disk_bytes=5 apples", "worker.kv_disk_bytes must be a number of bytes, such as 64MiB"),
        ("worker.parallel.expert_parallel=0", "worker.parallel.expert_parallel must be at least 1"),
        ('worker.parallel={"tensor_paralel": 2}', "did you mean worker.parallel.tensor_parallel?"),
        ("worker.max_batch_tokens=3", "worker.max_batch_tokens must be at least max_num_seqs"),
        ("router.max_retry_backoff_s=0.01", "router.max_retry_backoff_s must be at least retry_backoff_s"),
        ("router.port=70000", "router.port must be below 65536"),
        ("router.recovery_timeout_s=inf", "router.recovery_timeout_s must be a finite number"),
        ('router.api.api_keys=[""]', r"router.api.api_keys\[0\] must not be empty"),
        ("worker.max_num_seqs", "--set takes NAME=VALUE"),
        (
            "router.api.sampling_defaults.temperature=3",
            r"^router\.api\.sampling_defaults\.temperature must be between 0 and 2$",
        ),
        ("router.api.sampling_defaults.stop_token_ids=[-1]", r"sampling_defaults\.stop_token_ids needs token ids"),
        ("router.api.sampling_defaults.max_tokens=100", r"sampling_defaults\.max_tokens is for each request to say"),
        ("router.api.sampling_defaults.logprobs=1", r"sampling_defaults\.logprobs is for each request to say"),
        ("router.api.sampling_defaults.logit_bias=[[1]]", r"logit_bias\[0\] must be a list of at least 2 values"),
    ],
)
def test_a_wrong_setting_is_named_with_a_way_out(assignment: str, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        load(assignment)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(InvalidConfig, match=r"worker\.model is required"):
        load_config(None, {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "worker: [unclosed", "cannot parse"),
        ("a.yaml", "- a list", "must be a mapping"),
        ("a.json", "{", "cannot parse"),
        ("a.toml", "= 3", "cannot parse"),
        ("a.ini", "", "ends in .yaml, .json or .toml"),
        ("a.yaml", None, "cannot read the configuration"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidConfig, match=message) as caught:
        load_config(tmp_path / name, {})
    assert "\n" not in str(caught.value)


def test_a_truth_value_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"worker": {"model": "m", "max_num_seqs": true}}')
    with pytest.raises(InvalidConfig, match=r"worker\.max_num_seqs must be a number; it is True"):
        load_config(tmp_path / "a.json", {})


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 2**26), ("64Mi", 2**26), ("2g", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("-1", -1)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert load(f"worker.kv_host_bytes={text}").worker.kv_host_bytes == size


def test_the_environment_wins_over_the_file_and_flags_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("worker: {model: m, max_num_seqs: 1, max_queue: 1}\nrouter: {port: 1}\n")
    environment = {
        "BATON__WORKER__MAX_NUM_SEQS": "2",
        "BATON__ROUTER__PORT": "2",
        "BATON__ROUTER__API__API_KEYS": "a,b",
        "BATON_API_KEY": "of another rule",
        "HOME": "/",
    }
    config = load_config(file, {"router.port": 3, "worker.model": None}, (), environment)
    assert (config.worker.max_num_seqs, config.worker.max_queue, config.router.port) == (2, 1, 3)
    assert config.router.api.api_keys == (hashed("a"), hashed("b")) and config.worker.model == "m"
    with pytest.raises(InvalidConfig, match=r"did you mean worker\.max_queue\?"):
        load_config(file, {}, (), {"BATON__WORKER__MAX_QUEU": "2"})


SENTINEL = "sk-sentinel-123"


@pytest.mark.parametrize(
    "assignment",
    [
        f'router.api.api_keys=["{SENTINEL}"',
        f'router.api=["{SENTINEL}"]',
        f'router.api.admin_keys=["{SENTINEL}", 5]',
        f"store.url=etcd://user:{SENTINEL}@host",
        f"router.api.api_keyz={SENTINEL}",
        f"router.api.api_keys[0={SENTINEL}",
        f'router.api={{"api_keys": "{SENTINEL}"',
    ],
)
def test_no_message_and_no_log_shows_a_secret(assignment: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(assignment)
    assert SENTINEL not in str(caught.value)
    config = load(f"router.api.api_keys={SENTINEL}", f"store.url=redis://:{SENTINEL}@host/0")
    assert config.router.api.api_keys == (hashed(SENTINEL),)
    assert SENTINEL not in repr(config) and SENTINEL.encode() not in pickle.dumps(config.router)


def test_the_schema_is_valid_and_agrees_with_the_reader() -> None:
    written = schema()
    jsonschema.Draft202012Validator.check_schema(written)
    validator = jsonschema.Draft202012Validator(written)
    good: dict[str, Any] = {
        "worker": {"model": "m", "dtype": "bfloat16", "kv_disk_bytes": "4GiB"},
        "router": {"port": 9000},
        "pools": {"mixed": 1},
    }
    validator.validate(good)
    for bad in (
        {"worker": {"max_num_seq": 1}},
        {"worker": {"model": 3}},
        {"worker": {"dtype": "int8"}},
        {"worker": {"max_num_seqs": 0}},
        {"worker": {"kv_disk_bytes": "much"}},
        {"pools": {"decode": "two"}},
    ):
        assert not validator.is_valid(bad), bad
        with pytest.raises(InvalidConfig):
            build(ClusterConfig, {"worker": {"model": "m"}, **bad})
    described = written["$defs"]["WorkerConfig"]["properties"]["max_num_seqs"]
    assert described == {"type": "integer", "minimum": 1, "description": "Sequences that run at once.", "default": 64}
    assert json.dumps(written)


def test_every_setting_is_described_or_speaks_for_itself() -> None:
    """A setting without a description has a unit or a plain name; none is described by nothing but its type."""
    undescribed = {
        name
        for definition in schema()["$defs"].values()
        for name, written in definition["properties"].items()
        if "description" not in written
    }
    assert undescribed <= {
        "host", "http", "mixed", "decode", "prefill", "num_threads", "kv_memory_fraction", "prefix_cache", "max_retry_backoff_s",
        "store", "pools", "ray", "worker", "parallel", "dashboard", "api", "policy", "namespace",
    } | {field.name for kind in (SamplingParams, ThinkingBudget) for field in dataclasses.fields(kind)}  # fmt: skip


def test_workers_reserve_a_gpu_only_where_they_compute_on_one() -> None:
    assert "num_gpus" not in Pools(load())._worker_options("decode-0")
    assert Pools(load("worker.device=cuda"))._worker_options("decode-0")["num_gpus"] == 1
    shared = Pools(load("worker.device=cuda", "ray.worker_gpus=0.5"))
    assert shared._worker_options("decode-0")["num_gpus"] == 0.5
    assert "num_gpus" not in shared._options("router-0")
