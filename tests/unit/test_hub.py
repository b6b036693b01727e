"""A model named as on the Hugging Face Hub or on ModelScope is downloaded once, from a stand-in on loopback; what cannot be had is one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_standin import COMMIT, REPOSITORY, TOKEN, Hub, open_hub

from cluster.cli import make_parser
from cluster.commands.flags import config_from
from cluster.hub import is_repository
from cluster.preflight import check_model

SHIPPED = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"
MODELSCOPE = ["--set", "hub.source=modelscope"]
FETCH = (
    "import sys; from cluster.cli import make_parser; from cluster.commands.flags import config_from; "
    "config = config_from(make_parser().parse_args(['serve', *sys.argv[1:]])); "
    "print(config.worker.model, config.router.model, config.worker.served_model_name, sep='\\n')"
)


def run(hub: Hub, home: Path, code: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its environment once, when it is imported."""
    named = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(home),
        "MODELSCOPE_HOME": str(home),
        "NO_PROXY": "*",
        **environment,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "MODELSCOPE"))}
    return subprocess.run([sys.executable, *code], env=kept | named, capture_output=True, text=True, timeout=120)


def test_a_named_model_is_downloaded_without_what_could_be_run_resumed_and_kept(tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(SHIPPED, there)
    for name in ("pytorch_model.bin", "modeling_ernie.py", "optimizer.pt", "onnx/model.safetensors"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes(b"to be left alone")
    (there / "large.safetensors").write_bytes(bytes(24 << 20))  # the client keeps pieces of 10 MiB
    with open_hub(there) as hub:
        hub.cut = {"large.safetensors"}
        done = run(hub, tmp_path / "home", ["-c", FETCH, "--model", REPOSITORY])
        assert done.returncode == 0, done.stderr
        folder, router, served = done.stdout.split()
        assert folder == router and folder.endswith(COMMIT) and served == REPOSITORY
        check_model(folder)
        parts = [asked for name, asked in hub.downloads if name == "large.safetensors"]
        assert parts[0] is None and parts[-1] and not parts[-1].startswith("bytes=0-"), "the rest alone comes again"
        assert {name for name, _ in hub.downloads} == {
            "config.json", "generation_config.json", "large.safetensors", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *(
                name for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json") if (there / name).exists())
        }  # fmt: skip
        hub.downloads.clear()
        again = run(hub, tmp_path / "home", ["-c", FETCH, "--model", REPOSITORY], HF_HUB_OFFLINE="1")
        assert again.stdout == done.stdout and not hub.downloads


def test_the_same_from_modelscope(tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(SHIPPED, there)
    for name in ("pytorch_model.bin", "modeling_ernie.py", "configuration.json", "onnx/model.safetensors"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes(b"{}")
    asked = ["-c", FETCH, *MODELSCOPE, "--model", REPOSITORY]
    with open_hub(there) as hub:
        hub.cut = {"model.safetensors"}
        done = run(hub, tmp_path / "home", asked)
        assert done.returncode == 0, done.stderr
        folder, router, served = done.stdout.split()[-3:]
        assert folder == router and served == REPOSITORY
        check_model(folder)
        parts = [asked for name, asked in hub.downloads if name == "model.safetensors"]
        assert parts[0] is None and parts[-1] and not parts[-1].startswith("bytes=0-"), "the rest alone comes again"
        taken = {name for name, _ in hub.downloads}
        assert not any(name.endswith((".bin", ".py")) or "/" in name for name in taken)
        hub.downloads.clear()
        again = run(hub, tmp_path / "home", asked)
        assert again.stdout.split()[-3:] == [folder, router, served] and not hub.downloads
    alone = run(hub, tmp_path / "home", asked)
    assert alone.stdout.split()[-3:] == [folder, router, served], "from the cache where ModelScope does not answer"


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ([*MODELSCOPE, "--model", "baidu/nothing"], {}, "there is no such repository or revision"),
        ([*MODELSCOPE, "--model", "baidu/gated"], {}, "set MODELSCOPE_API_TOKEN"),
        ([*MODELSCOPE, "--model", REPOSITORY, "--revision", "v9"], {}, "there is no such repository or revision"),
        ([*MODELSCOPE, "--model", "baidu/gated"], {"MODELSCOPE_API_TOKEN": TOKEN}, "config.json is missing"),
        (["--model", "baidu/nothing"], {}, "there is no such repository for who asks"),
        (["--model", "baidu/gated"], {}, "set HF_TOKEN"),
        (["--model", REPOSITORY, "--revision", "v9"], {}, "it has no revision 'v9'"),
        (["--model", REPOSITORY], {"HF_HUB_OFFLINE": "1"}, "not in the cache"),
        (["--model", "baidu/gated"], {"HF_TOKEN": TOKEN}, "config.json is missing"),
        (["--model", REPOSITORY], {"SSL_CERT_FILE": "/nonexistent.pem"}, f"cannot download the model '{REPOSITORY}': "),
        (["--model", REPOSITORY], {"HTTPS_PROXY": "garbage://x", "NO_PROXY": ""}, "garbage://x"),
        (["--model", "baidu/garbage"], {}, "cannot download the model 'baidu/garbage': RemoteProtocolError"),
    ],
)
def test_what_cannot_be_had_is_one_sentence_and_code_2(
    tmp_path: Path, flags: list[str], environment: dict[str, str], message: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    with open_hub(tmp_path / "there") as hub:
        ended = run(hub, tmp_path / "home", ["-m", "cluster.cli", "serve", *flags], **environment)
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("baton: ") and "Traceback" not in ended.stderr


def test_a_hub_that_hangs_up_talks_nonsense_or_says_nothing_is_one_sentence_each(tmp_path: Path) -> None:
    code = (
        "from cluster.hub import HubConfig, fetch\n"
        "from workers.errors import InvalidConfig\n"
        "for name in ('closes', 'garbage', 'page', 'silent'):\n"
        "    try:\n"
        "        fetch(f'baidu/{name}', HubConfig())\n"
        "    except InvalidConfig as error:\n"
        "        print(error)\n"
    )
    with open_hub(tmp_path) as hub:
        ended = run(hub, tmp_path / "home", ["-c", code], HF_HUB_DOWNLOAD_TIMEOUT="1")
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0 and len(lines) == 4, ended
    for name, line in zip(("closes", "garbage", "page", "silent"), lines, strict=True):
        assert line.startswith(f"cannot download the model 'baidu/{name}': ") and line.endswith("a checkpoint folder")


def test_a_path_is_no_name_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert is_repository("baidu/ERNIE-4.5-21B-A3B-PT")
    assert not any(map(is_repository, ("models/mine", "/models/mine", "./models", "mine", "a/b/c", "../mine", "")))


def test_a_relative_model_in_a_file_is_the_folder_beside_the_file_even_when_it_looks_like_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "models").mkdir()
    (tmp_path / "etc" / "models" / "ernie").symlink_to(SHIPPED)
    (tmp_path / "etc" / "baton.yaml").write_text("worker: {model: models/ernie}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = config_from(make_parser().parse_args(["serve", "--config", str(tmp_path / "etc" / "baton.yaml")]), {})
    assert config.worker.model == str(SHIPPED.resolve())
    assert is_repository("models/ernie")
