"""`baton doctor` and `baton debug bundle`: what is judged how, what a router in trouble looks like, and that no secret gets out."""

from __future__ import annotations

import json
import os
import re
import socket
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, serve

from cluster.cli import main
from cluster.config import load_config
from cluster.doctor.bundle import without_secrets
from cluster.doctor.findings import (
    HostFacts,
    Verdict,
    is_well,
    judge_answer,
    judge_clocks,
    judge_host,
    judge_port,
    judge_workers,
)
from cluster.doctor.ports import PortFacts, Process, look_at_port, program_name
from router.config import ApiConfig
from workers.text.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "models" / "ernie-4.5-tiny"
HOST = HostFacts("3.12", "0.1", "2.60", "2.13", ("avx2",), ("avx2",), 4, 8 << 30, 1 << 30, 65536, (), False)


def view(name: str, role: str, **changes: Any) -> dict[str, Any]:
    status = {
        "worker_id": name,
        "role": role,
        "is_draining": False,
        "is_rebuilding": False,
        "model": {"fingerprint": "f"},
    }
    status |= {key: value for key, value in changes.items() if key in status}
    return {
        "status": status,
        "connected": changes.get("connected", True),
        "frame_age_s": changes.get("frame_age_s", 0.1),
    }


def verdicts(*views: dict[str, Any]) -> dict[tuple[str, Verdict], str]:
    return {(f.subject, f.verdict): f.text for f in judge_workers({"workers": list(views)})}


def test_a_cluster_that_works_is_well() -> None:
    found = judge_workers({"workers": [view("p", "prefill"), view("d", "decode")]})
    assert is_well(found) and {f.verdict for f in found} == {Verdict.OK}
    assert is_well(judge_workers({"workers": [view("m", "mixed")]}))


def test_what_is_wrong_with_workers_is_said_with_what_to_do() -> None:
    assert not is_well(judge_workers({"workers": []}))
    gone = verdicts(view("p", "prefill"), view("d", "decode", connected=False))
    assert "not connected: d" in gone["workers", Verdict.FAIL] and "no worker can decode" in gone["roles", Verdict.FAIL]
    drained = verdicts(view("p", "prefill", is_draining=True), view("d", "decode"))
    assert "no worker prefills" in drained["roles", Verdict.WARN] and "draining: p" in drained["workers", Verdict.WARN]
    mixed = verdicts(view("a", "mixed"), view("b", "mixed", model={"fingerprint": "g"}))
    assert "2 different ones" in mixed["fingerprints", Verdict.FAIL]
    many = verdicts(*[view(f"w-{at:02}", "mixed", frame_age_s=60.0) for at in range(30)])
    assert "w-09 and 20 more" in many["workers", Verdict.WARN]


def test_a_long_prompt_that_no_prefill_worker_computed_is_a_fault() -> None:
    def answered(by: str, prefill: tuple[str, ...], is_long: bool) -> Verdict:
        way = {"prefill_worker": by, "decode_worker": "d"}
        answer = {"usage": {"completion_tokens": 8}, "baton": {"choices": [way]}}
        return judge_answer(answer, prefill, is_long).verdict

    assert answered("p", ("p",), True) is Verdict.OK
    assert answered("d", ("p",), True) is Verdict.FAIL
    assert answered("d", ("p",), False) is answered("d", (), True) is Verdict.OK
    assert judge_answer({"usage": {}}).verdict is Verdict.FAIL


def test_what_is_short_on_a_host_is_a_warning() -> None:
    assert {f.verdict for f in judge_host(HOST)} == {Verdict.OK}
    poor = replace(HOST, kernels=(), shared_bytes=64 << 20, num_files=1024, memory_bytes=1 << 20)
    warned = {f.subject for f in judge_host(poor) if f.verdict is Verdict.WARN}
    assert warned == {"kernels", "/dev/shm", "files", "memory"} and is_well(judge_host(poor))
    assert judge_clocks(100.0, 101.0).verdict is Verdict.OK and judge_clocks(100.0, 160.0).verdict is Verdict.WARN


def test_who_has_a_port_is_said_and_what_to_do_where_it_is_not_baton() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        facts = look_at_port("router.port", "127.0.0.1", port)
        assert [each.pid for each in facts.takers] == [os.getpid()]
        name = facts.takers[0].name
        other = judge_port(replace(facts, takers=(Process(os.getpid(), "nginx"),)))
        assert other.verdict is Verdict.WARN
        assert other.text.startswith(f"{port} (router.port) is taken by nginx (process {os.getpid()}): stop it")
        own = judge_port(facts, own_pids=(os.getpid(),))
        assert own.verdict is Verdict.OK and f"taken by {name} (process" in own.text
        assert judge_port(replace(facts, takers=(Process(1, "ray::router-0"),))).verdict is Verdict.OK
        assert "may not see" in judge_port(replace(facts, takers=())).text
    free = judge_port(look_at_port("router.port", "127.0.0.1", port))
    assert free.verdict is Verdict.OK and free.text == f"{port} (router.port) is free"
    nowhere = judge_port(look_at_port("router.port", "192.0.2.1", port))
    assert nowhere.verdict is Verdict.WARN and "'192.0.2.1' is not an address of this host" in nowhere.text
    assert "choose one from 1024 on" in judge_port(PortFacts("router.port", 80, is_free=False)).text


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("/usr/bin/python3.11 /venv/bin/baton serve --x", "baton"),
        ("python -m baton.cli serve", "baton"),
        ("ray::router-0", "ray::router-0"),
        ("/usr/sbin/nginx -g secret", "nginx"),
        ("python3", "python3"),
    ],
)
def test_a_program_is_named_without_its_arguments(words: str, name: str) -> None:
    assert program_name(b"\0".join(words.encode().split()) + b"\0") == name


def test_the_doctor_asks_a_router_as_helm_test_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "api").write_text("the-api-key")
    (tmp_path / "admin").write_text("the-admin-key")
    keys = [f"--{kind}-key-file={tmp_path}/{kind}" for kind in ("api", "admin")]
    with serve(
        FakeBackend(Tokenizer.load(MODEL)), ApiConfig(api_keys=("the-api-key",), admin_keys=("the-admin-key",))
    ) as url:
        assert main(["doctor", "--url", url, "--ask", "--json", *keys]) == 0
        found = {each["subject"]: each["verdict"] for each in json.loads(capsys.readouterr().out)}
        assert {found[name] for name in ("router", "ready", "workers", "metrics", "request", "stream")} == {"ok"}
        assert main(["doctor", "--url", url, "--ask", keys[1]]) == 1
        assert "answered with 401" in capsys.readouterr().out
        archive = tmp_path / "bundle.tar.gz"
        assert main(["debug", "bundle", "--url", url, "--out", str(archive), keys[1]]) == 0
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
        everything = b"".join(packed.extractfile(name).read() for name in packed.getnames())  # type: ignore[union-attr]
    assert {"doctor.txt", "status.json", "roles.json", "metrics.txt", "settings.json"} <= names
    assert b"decode-0" in everything and b"the-admin-key" not in everything and b"the-api-key" not in everything
    assert archive.stat().st_mode & 0o777 == 0o600


def test_a_router_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--url", "http://127.0.0.1:9"]) == 1
    assert "nobody answers at http://127.0.0.1:9" in capsys.readouterr().out
    assert main(["doctor", "--host-only"]) == 0
    assert re.search(r"^(ok|warn) +port: 8000 \(router.port\) is ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("where", ["file", "set", "flag", "environment"])
def test_the_ray_that_is_looked_at_is_the_one_of_the_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        file = tmp_path / "baton.yaml"
        file.write_text(f"ray: {{address: '{address}'}}\n" if where == "file" else "{}\n")
        flags = {"set": ["--set", f"ray.address={address}"], "flag": ["--ray-address", address]}.get(
            where, ["--config", str(file)]
        )
        if where == "environment":
            monkeypatch.setenv("BATON__RAY__ADDRESS", address)
        main(["doctor", "--url", "http://127.0.0.1:9", "--model", str(MODEL), *flags])
    assert f"its head listens at {address}" in capsys.readouterr().out


def test_settings_leave_their_secrets_behind() -> None:
    given = {
        "worker.model": "m",
        "router.model": "m",
        "router.api.api_keys": ("k-1",),
        "router.api.admin_keys": ("k-2",),
    }
    config = load_config(None, {**given, "store.url": "redis://user:hush@redis:6379/2?password=hush"})
    shown = json.dumps(without_secrets(asdict(config)), default=str)
    assert "hush" not in shown and "sha256" not in shown and "redis://redis:6379/2" in shown and '"1 keys"' in shown
