"""What commands of containers decide without any process: how Ray's nodes are started, what probes say, which secrets are taken."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_process import free_port

from cluster.actors.waiting import ask_head
from cluster.cli import main
from cluster.config import RayConfig, load_config
from cluster.probes import LIVE_S, Probes, ProbeServer
from cluster.ray_session.node import plan_head, plan_member
from cluster.secret_files import is_private
from workers.errors import InvalidConfig


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "token").write_text("t" * 64)
    return str(tmp_path / "token")


def test_nodes_of_ray_ask_for_a_token_and_are_not_started_without_one(token: str) -> None:
    with pytest.raises(InvalidConfig, match=r"ray\.token_file"):
        plan_member(RayConfig(address="10.0.0.1:6379"), "10.0.0.2")
    plan = plan_member(RayConfig(address="10.0.0.1:6379", token_file=token), "10.0.0.2", 4)
    assert plan.environment["RAY_AUTH_MODE"] == "token" and plan.environment["RAY_AUTH_TOKEN_PATH"] == token
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2", "--num-cpus=4"} <= set(plan.arguments)
    with pytest.raises(InvalidConfig, match="HOST:PORT"):
        plan_member(RayConfig(address="auto", token_file=token), "10.0.0.2")


def test_a_head_keeps_its_tables_where_the_store_is(token: str, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("hush")
    password.chmod(0o600)
    config = load_config(None, {"worker.model": "m", "router.model": "m", "ray.token_file": token})
    assert "RAY_REDIS_ADDRESS" not in plan_head(config, "10.0.0.1", 6379).environment
    store = replace(config.store, url="rediss://redis:7000/3", ca_file="/ca", password_file=str(password), username="u")
    plan = plan_head(replace(config, store=store), "10.0.0.1", 6379)
    assert plan.environment["RAY_REDIS_ADDRESS"] == "rediss://redis:7000"
    assert plan.environment["RAY_REDIS_CA_CERT"] == "/ca"
    assert {"--redis-password=hush", "--redis-username=u", "--num-cpus=0"} <= set(plan.arguments)


async def test_a_head_that_is_gone_is_not_waited_for() -> None:
    """Ray's calls hold their thread until the head is back; the process must be able to end meanwhile."""
    answers = threading.Event()
    assert not await ask_head(lambda: answers.wait(), 0.01)
    answers.set()
    asked: list[str] = []
    assert await ask_head(lambda: asked.append("removed"), 60) and asked == ["removed"]


def test_probes_tell_loading_from_broken() -> None:
    now = [0.0]
    probes = Probes(lambda: now[0])
    assert probes.answer("/health")[0] == 200 and probes.answer("/ready")[0] == 503
    now[0] = LIVE_S - 1
    probes.is_ready = True
    assert probes.answer("/ready")[0] == 200
    now[0] = LIVE_S
    assert probes.answer("/health")[0] == 503 and probes.answer("/ready")[0] == 503
    probes.beat()
    assert probes.answer("/health")[0] == 200 and probes.answer("/metrics")[0] == 404


def test_probes_are_served_over_http_and_a_taken_port_is_told() -> None:
    port = free_port()
    server = ProbeServer(Probes(), "127.0.0.1", port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10)
        with pytest.raises(InvalidConfig, match=f"--probe-port {port}"):
            ProbeServer(Probes(), "127.0.0.1", port)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("mode", "owner", "group", "user", "groups", "taken"),
    [
        (0o600, 1000, 1000, 1000, (1000,), True),
        (0o640, 1000, 1000, 1000, (1000,), False),
        (0o440, 0, 10001, 10001, (10001,), True),  # a Secret with fsGroup
        (0o440, 0, 10001, 10001, (5,), False),
        (0o444, 0, 10001, 10001, (10001,), False),
        (0o460, 0, 10001, 10001, (10001,), False),
        (0o440, 0, 0, 0, (0,), False),
        (0o400, 7, 7, 1000, (1000,), False),
    ],
)
def test_secrets_of_kubernetes_are_taken_and_no_more(
    mode: int, owner: int, group: int, user: int, groups: tuple[int, ...], taken: bool
) -> None:
    status = os.stat_result((0o100000 | mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    assert is_private(status, user, groups) is taken


def test_what_cannot_work_in_a_container_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "clear"]) == 2
    assert "nothing outlives the cluster" in capsys.readouterr().err
    assert main(["router", "--name", "r", "--without-ray", "--port", "0"]) == 2
    assert "--without-ray needs the store in Redis" in capsys.readouterr().err
    assert main(["worker", "--name", "w", "--start-node"]) == 2
    assert "--start-node needs --host" in capsys.readouterr().err
