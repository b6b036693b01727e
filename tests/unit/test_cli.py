"""The `baton` command in processes of its own: operator errors are one sentence and exit code 2, quickly and without Ray."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"


def baton(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.fixture
def closed_port() -> int:
    """Nobody listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def assert_one_sentence(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert run.returncode == 2, run
    assert run.stderr.startswith("baton: ") and run.stderr.count("\n") == 1, run.stderr
    for part in parts:
        assert part in run.stderr
    assert run.stdout == ""


def test_a_bad_model_path_is_one_sentence() -> None:
    assert_one_sentence(baton("serve", "--model", "/nowhere/at/all"), "'/nowhere/at/all'", "--model")


def test_a_wrong_key_is_one_sentence_with_the_closest_name() -> None:
    run = baton("serve", "--model", str(MODEL), "--set", "worker.max_num_seq=3")
    assert_one_sentence(run, "did you mean worker.max_num_seqs?")


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_sentence(baton("serve", "--model", str(MODEL), "--port", port), f"port {port}", "in use", "--port")


def test_too_little_memory_is_one_sentence() -> None:
    run = baton("serve", "--model", str(MODEL), "--port", "0", "--set", "worker.kv_memory_bytes=99999GiB")
    assert_one_sentence(run, "of memory", "--prefill")


def test_an_unreachable_redis_is_one_sentence(closed_port: int) -> None:
    run = baton("serve", "--model", str(MODEL), "--port", "0", "--store", f"redis://127.0.0.1:{closed_port}/0")
    assert_one_sentence(run, f"127.0.0.1:{closed_port}", "does not answer", "--store")


@pytest.mark.parametrize("flags", [("--store", "{url}"), ("--set", "store.url={url}")])
def test_a_password_on_the_command_line_is_refused_without_being_shown(
    flags: tuple[str, str], closed_port: int
) -> None:
    url = f"redis://:hunter2@127.0.0.1:{closed_port}/0"
    run = baton("serve", "--model", str(MODEL), "--port", "0", *(flag.format(url=url) for flag in flags))
    assert_one_sentence(run, "command line", "store.password_file")
    assert "hunter2" not in run.stdout + run.stderr


def test_pools_that_cannot_serve_are_one_sentence() -> None:
    assert_one_sentence(baton("serve", "--model", str(MODEL), "--decode", "0"), "no worker could decode")


@pytest.mark.parametrize("command", [("worker", "--name", "decode-1"), ("router", "--name", "router-1", "--port", "0")])
def test_an_unreachable_ray_is_one_sentence(command: tuple[str, ...], closed_port: int) -> None:
    run = baton(*command, "--model", str(MODEL), "--ray-address", f"127.0.0.1:{closed_port}")
    run.stderr = run.stderr.partition("\n")[2]  # after the step that failed
    assert_one_sentence(run, f"no Ray listens at 127.0.0.1:{closed_port}", "--ray-address")


@pytest.mark.parametrize(
    "command", [("status",), ("switch-role", "decode-0", "mixed"), ("drain", "decode-0"), ("chat",)]
)
def test_an_unreachable_router_is_one_sentence(command: tuple[str, ...], closed_port: int) -> None:
    run = baton(*command, "--url", f"http://127.0.0.1:{closed_port}", stdin="hello\n")
    assert_one_sentence(run, f"127.0.0.1:{closed_port}", "baton serve", "--url")


def test_the_routers_url_may_come_from_the_environment(closed_port: int) -> None:
    assert_one_sentence(baton("status", BATON_URL=f"http://127.0.0.1:{closed_port}"), str(closed_port))
    assert_one_sentence(baton("status", "--url", "localhost:8000"), "must start with http")


def test_debug_shows_where_an_error_came_from() -> None:
    run = baton("--debug", "serve", "--model", "/nowhere")
    assert run.returncode == 2 and "Traceback" in run.stderr


def test_a_checkpoint_that_was_not_fetched_is_one_sentence(tmp_path: Path) -> None:
    for file in MODEL.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 80726\n")
    for command in ("serve", "demo"):
        assert_one_sentence(baton(command, "--model", str(tmp_path)), "model.safetensors", "git lfs pull")


def test_a_demo_without_questions_is_one_sentence(tmp_path: Path) -> None:
    for file in MODEL.iterdir():
        if file.name != "skills.json":
            shutil.copy(file, tmp_path)
    assert_one_sentence(baton("demo", "--model", str(tmp_path)), "skills.json")


def test_help_and_version_need_neither_torch_nor_ray() -> None:
    code = "import sys; from cluster import cli; cli.main(['version']); print('torch' in sys.modules, 'ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("baton ") and run.stdout.endswith("False False\n"), run
    assert "switch-role" in baton("--help").stdout


def test_the_schema_is_printed_as_json() -> None:
    run = baton("config-schema")
    assert run.returncode == 0 and json.loads(run.stdout)["$defs"]["WorkerConfig"]["type"] == "object"


def test_what_a_draining_worker_still_holds_is_said_in_words() -> None:
    from cluster.commands.drain import what_is_left

    load = {"num_running": 2, "num_waiting": 0, "num_transferring": 1}
    worker = {"worker_id": "decode-1", "load": load, "counters": {"held_blocks": 9.0, "running_transfers": 1.0}}
    view = {"status": worker, "connected": True, "num_requests": 3}
    assert what_is_left({"workers": [view]}, "decode-1") == "3 requests, 9 KV blocks, 1 transfer"
    assert what_is_left({"workers": [view]}, "decode-0") == ""
    assert what_is_left({"workers": [view | {"connected": False}]}, "decode-1") == ""
    empty = worker | {"load": dict.fromkeys(load, 0), "counters": {"held_blocks": 0.0}}
    assert what_is_left({"workers": [view | {"status": empty, "num_requests": 0}]}, "decode-1") == ""
