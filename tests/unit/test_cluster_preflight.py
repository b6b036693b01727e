"""What is refused before anything starts: models, ports, memory; and the processes and tables the CLI works with."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.commands.demo import is_right, read_questions
from cluster.commands.serve import example_request
from cluster.config import load_config
from cluster.console.output import duration, size, status_table
from cluster.preflight import check_disk_tier, check_memory, check_model, check_port, weight_bytes
from cluster.ray_session import processes
from cluster.ray_session.folders import end_local, make_folder, remove_stale
from cluster.ray_session.session import free_port
from cluster.steps import AT_ONCE, all_of
from workers.config import WorkerConfig
from workers.errors import InvalidConfig, InvariantViolated

SHIPPED = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 80726\n"


def write_model(folder: Path, elements: int = 0) -> Path:
    """The shipped checkpoint; with `elements` one tensor of so many bfloat16 values in place of its weights, whose bytes take no
    room on the disk.
    """
    if not elements:
        shutil.copytree(SHIPPED, folder)
        return folder
    folder.mkdir(exist_ok=True)
    for file in SHIPPED.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / "model.safetensors", 8 + len(header) + 2 * elements)
    return folder


def edited(folder: Path, name: str, **changes: object) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), r"config\.json is missing"),
    "a list as config": (lambda m: (m / "config.json").write_text("[]"), r"config\.json must hold a JSON object"),
    "another model": (lambda m: edited(m, "config.json", model_type="llama"), r"config\.json has model_type 'llama'"),
    "a list as rope": (lambda m: edited(m, "config.json", rope_scaling=[1]), r"config\.json needs an object as rope"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "weights not fetched": (
        lambda m: (m / "model.safetensors").write_text(POINTER),
        r"model\.safetensors .*git lfs pull",
    ),
    "weights cut": (lambda m: os.truncate(m / "model.safetensors", 900), r"model\.safetensors .*download complete"),
    "empty weights": (lambda m: os.truncate(m / "model.safetensors", 0), r"model\.safetensors .*download complete"),
    "a shard missing": (
        lambda m: (
            (m / "model.safetensors").rename(m / "a.safetensors"),
            (m / "model.safetensors.index.json").write_text(
                '{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}'
            ),
        ),
        r"b\.safetensors is missing",
    ),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), r"neither tokenizer\.json nor tokenizer\.model"),
    "tokenizer not fetched": (
        lambda m: (m / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is not a tokenizer",
    ),
    "template not UTF-8": (
        lambda m: (m / "chat_template.jinja").write_bytes(b"{# caf\xe9 #}"),
        r"chat_template\.jinja is not UTF-8",
    ),
    "template not Jinja": (
        lambda m: (m / "chat_template.jinja").write_text("{% if %}"),
        r"chat template does not parse",
    ),
    "templates without names": (
        lambda m: ((m / "chat_template.jinja").unlink(), edited(m, "tokenizer_config.json", chat_template=["x"])),
        r"tokenizer_config\.json has a chat_template list",
    ),
    "a list as sampling defaults": (
        lambda m: (m / "generation_config.json").write_text("[]"),
        r"generation_config\.json",
    ),
    "sampling out of range": (
        lambda m: edited(m, "generation_config.json", top_p=7),
        r"generation_config\.json: top_p",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_refused_with_the_name_of_its_file(tmp_path: Path, fault: str) -> None:
    model = write_model(tmp_path / "m")
    check_model(str(model))
    spoil, message = BROKEN[fault]
    spoil(model)
    with pytest.raises(InvalidConfig, match=message) as caught:
        check_model(str(model))
    assert "\n" not in str(caught.value) and str(model) in str(caught.value)


def test_a_sentencepiece_tokenizer_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else object())
    with pytest.raises(InvalidConfig, match=r"tokenizer\.model, which needs .* \(missing: sentencepiece\)"):
        check_model(str(model))


def test_a_model_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "there is no such folder"),
        (SHIPPED / "config.json", "that is a file"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            check_model(str(path))


def test_what_is_shown_to_an_operator_names_no_key() -> None:
    with_key = example_request("http://127.0.0.1:1", is_chat=True, needs_key=True)
    assert "$BATON_API_KEY" in with_key and "/chat/completions" in with_key
    without = example_request("http://127.0.0.1:1", is_chat=False, needs_key=False)
    assert "Authorization" not in without and "/v1/completions" in without


def test_memory_is_counted_per_worker_in_the_configured_type(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", elements=10**9)
    config = load_config(None, {"worker.model": str(model), "pools.decode": 3})
    assert weight_bytes(config.worker) == 4 * 10**9
    check_memory(config, free_bytes=32 * 2**30)
    with pytest.raises(InvalidConfig, match=r"4 workers need about 17\.\d GiB of memory and 8\.0 GiB is free"):
        check_memory(config, free_bytes=8 * 2**30)
    half = load_config(None, {"worker.model": str(model), "pools.decode": 3, "worker.dtype": "bfloat16"})
    assert weight_bytes(half.worker) == 2 * 10**9


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
        check_memory(config, free_bytes=6 * 2**30)


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
    marker = f"/tmp/baton-test-{os.getpid()}"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)'])"
    parent = subprocess.Popen([sys.executable, "-c", child, marker], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.read(1) == b"1"
    members = processes.family(marker)
    assert len(members) == 2 and parent.pid in {member.pid for member in members}
    assert processes.end(members, patience_s=5.0) == ()
    assert processes.alive(members) == ()
    assert parent.wait() == -signal.SIGTERM
    parent.stdout.close()


@pytest.mark.parametrize("marker", ["", "/", "/tmp", "/tmp/", "baton-x", "./baton-x"])
def test_what_is_no_folder_of_ours_has_no_family_that_could_be_ended(marker: str) -> None:
    """Every command line holds an empty text: the end of a cluster without certificates once ended every process of its user."""
    with pytest.raises(InvariantViolated):
        processes.family(marker)


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


def test_a_folder_whose_owner_was_killed_is_removed_with_its_processes_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # as sockets' paths must be
        monkeypatch.setattr(tempfile, "tempdir", short)
        mine = make_folder()
        (Path(short) / "baton-of-somebody-else").mkdir()
        code = (
            "import subprocess, sys, time; from cluster.ray_session.folders import make_folder; folder = make_folder();"
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', folder]); print(folder, flush=True); time.sleep(60)"
        )
        environment = {**os.environ, "TMPDIR": short}
        owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        assert owner.stdout is not None
        left = owner.stdout.readline().strip()
        assert remove_stale() == () and Path(left).is_dir()
        owner.kill()
        owner.wait()
        orphans = processes.family(left)
        assert len(orphans) == 1
        assert remove_stale() == (left,)
        assert not Path(left).exists() and processes.alive(orphans) == () and Path(mine).is_dir()
        end_local(mine, 0.0)
        assert [path.name for path in Path(short).iterdir()] == ["baton-of-somebody-else"]
        owner.stdout.close()


async def test_jobs_of_a_start_run_side_by_side_within_a_bound_and_a_failure_waits_for_the_rest() -> None:
    running, most, ended = 0, 0, []
    together = asyncio.Event()

    async def job(number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == AT_ONCE:
            together.set()
        await together.wait()  # for ever, if they ran one after another
        running -= 1
        if number == 3:
            raise InvalidConfig("number 3")
        ended.append(number)

    with pytest.raises(InvalidConfig, match="number 3"):
        await asyncio.wait_for(all_of([job(number) for number in range(3 * AT_ONCE)]), 60)
    assert most == AT_ONCE and len(ended) == 3 * AT_ONCE - 1


def test_the_status_table_shows_each_worker_in_a_line() -> None:
    load = {"num_running": 3, "num_waiting": 1, "num_free_blocks": 60, "num_blocks": 64}
    status = {"worker_id": "decode-0", "role": "decode", "generation": (2 << 32) + 1, "load": load}
    view = {"status": status, "connected": True, "frame_age_s": 0.0123, "num_requests": 4}
    text = status_table({"router_id": "router-0", "num_running": 4, "num_waiting": 0, "workers": [view]})
    head, _, headings, row = text.split("\n")
    assert head == "router-0: 4 running, 0 waiting"
    assert row.split() == [
        "decode-0",
        "decode",
        "1970-01-01T00:00:02Z/1",
        "connected",
        "4",
        "3",
        "1",
        "4/64",
        "12.3",
        "ms",
    ]
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
