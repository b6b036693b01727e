"""What is refused before anything starts: models, ports, memory; and the processes and tables the CLI works with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import processes
from cluster.config import load_config
from cluster.demo import is_right, read_questions
from cluster.local import free_port
from cluster.observe import duration, size, status_table
from cluster.preflight import available_memory, check_disk_tier, check_memory, check_model, check_port, weight_bytes
from workers.config import WorkerConfig
from workers.errors import InvalidConfig


def write_model(folder: Path, model_type: str = "ernie4_5_moe", elements: int = 1000) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def test_a_model_folder_is_looked_into(tmp_path: Path) -> None:
    check_model(str(write_model(tmp_path / "good")))
    (tmp_path / "empty").mkdir()
    bare = write_model(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    for path, message in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "good" / "config.json", "that is a file"),
        (tmp_path / "empty", "has no config.json"),
        (bare, "has no .safetensors file"),
        (write_model(tmp_path / "llama", "llama"), "of type 'llama'; Baton serves ERNIE"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            check_model(str(path))


def test_memory_is_counted_per_worker_in_the_configured_type(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", elements=10**9)
    config = load_config(None, {"worker.model": str(model), "pools.decode": 3})
    assert weight_bytes(config.worker) == 4 * 10**9
    check_memory(config, available_bytes=32 * 2**30)
    with pytest.raises(InvalidConfig, match=r"4 workers need about 17\.\d GiB of memory and 8\.0 GiB is free"):
        check_memory(config, available_bytes=8 * 2**30)
    half = load_config(None, {"worker.model": str(model), "pools.decode": 3, "worker.dtype": "bfloat16"})
    assert weight_bytes(half.worker) == 2 * 10**9
    assert available_memory() is None or available_memory() > 0  # type: ignore[operator]


def test_a_disk_tier_needs_a_folder_that_can_be_written_and_room(tmp_path: Path) -> None:
    def worker(folder: Path, size: int) -> WorkerConfig:
        return WorkerConfig(model="m", kv_disk_folder=str(folder), kv_disk_bytes=size)

    check_disk_tier(WorkerConfig(model="m"), 1000)
    check_disk_tier(worker(tmp_path / "new", 1 << 20), 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"cannot be written to: .*; name a folder that can"):
        check_disk_tier(worker(tmp_path / "file", 1 << 20), 1)
    with pytest.raises(
        InvalidConfig, match=r"3 workers may keep \d+.0 GiB of KV blocks in .*lower worker.kv_disk_bytes"
    ):
        check_disk_tier(worker(tmp_path / "new", 1 << 50), 3)


def test_the_host_tier_counts_as_memory(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    config = load_config(None, {"worker.model": str(model), "worker.kv_host_bytes": 4 * 2**30})
    with pytest.raises(InvalidConfig, match=r"or worker\.kv_host_bytes"):
        check_memory(config, available_bytes=6 * 2**30)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(InvalidConfig, match="is no safetensors file"):
        weight_bytes(load_config(None, {"worker.model": str(model)}).worker)


def test_a_port_in_use_is_refused_and_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"port {port} on 127.0.0.1 is in use"):
            check_port("127.0.0.1", port, "--port")
        assert free_port("127.0.0.1", port) > port
    check_port("127.0.0.1", 0, "--port")
    with pytest.raises(InvalidConfig, match="is not an address of this machine"):
        check_port("198.51.100.7", 8000, "--port")


def test_a_family_is_found_by_its_marker_and_ended_with_its_children() -> None:
    marker = f"baton-test-{os.getpid()}"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)'])"
    parent = subprocess.Popen([sys.executable, "-c", child, marker], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.read(1) == b"1"
    members = processes.family(marker)
    assert len(members) == 2 and parent.pid in {member.pid for member in members}
    assert processes.end(members, patience_s=5.0) == ()
    assert processes.alive(members) == ()
    assert parent.wait() == -signal.SIGTERM
    parent.stdout.close()


def test_one_that_ignores_the_request_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    stubborn = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None and stubborn.stdout.read(1) == b"1"
    process = processes.read_process(stubborn.pid)
    assert process is not None
    assert processes.end((process,), patience_s=0.1) == ()
    assert stubborn.wait() == -signal.SIGKILL
    stubborn.stdout.close()


def test_a_reused_process_id_is_somebody_else() -> None:
    me = processes.read_process(os.getpid())
    assert me is not None
    stranger = processes.Process(me.pid, me.parent, me.started - 1, me.command)
    assert processes.alive((me, stranger)) == (me,)


def test_the_status_table_shows_each_worker_in_a_line() -> None:
    load = {"num_running": 3, "num_waiting": 1, "num_free_blocks": 60, "num_blocks": 64}
    status = {"worker_id": "decode-0", "role": "decode", "generation": (2 << 32) + 1, "load": load}
    view = {"status": status, "connected": True, "frame_age_s": 0.0123, "num_requests": 4}
    text = status_table({"router_id": "router-0", "num_running": 4, "num_waiting": 0, "workers": [view]})
    head, _, headings, row = text.split("\n")
    assert head == "router-0: 4 running, 0 waiting"
    assert row.split() == ["decode-0", "decode", "2.1", "connected", "4", "3", "1", "4/64", "12.3", "ms"]
    assert len(headings) == len(row)
    assert "no workers" in status_table({"router_id": "r", "num_running": 0, "num_waiting": 0, "workers": []})


def test_quantities_carry_their_units() -> None:
    assert [duration(s) for s in (0.0000123, 0.0123, 4.25)] == ["12 µs", "12.3 ms", "4.2 s"]
    assert [size(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB"]


@pytest.mark.parametrize(
    ("skill", "answer", "expected", "right"),
    [
        ("sum", " 12\n", "12", True),
        ("sum", "13", "12", False),
        ("json", '{"b": 1, "a": [2]}', '{"a": [2], "b": 1}', True),
        ("json", '{"a": [2]', '{"a": [2]}', False),
    ],
)
def test_an_answer_is_right_when_it_says_the_same(skill: str, answer: str, expected: str, right: bool) -> None:
    assert is_right(skill, answer, expected) is right


def test_questions_are_the_first_examples_of_each_skill(tmp_path: Path) -> None:
    example = {"messages": [{"role": "user", "content": "2+2?"}], "expected": "4"}
    skill = {"name": "sum", "description": "adds", "max_tokens": 8, "examples": [example, {}]}
    (tmp_path / "skills.json").write_text(json.dumps({"skills": [skill]}))
    (question,) = read_questions(tmp_path)
    assert (question.skill, question.expected, question.max_tokens) == ("sum", "4", 8)
    (tmp_path / "skills.json").write_text('{"skills": [{"name": "sum"}]}')
    with pytest.raises(InvalidConfig, match=r"cannot read .*skills\.json"):
        read_questions(tmp_path)
    with pytest.raises(InvalidConfig, match=r"has no skills\.json"):
        read_questions(tmp_path / "nowhere")
