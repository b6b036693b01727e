"""A decode worker of two ranks beside workers of one: the same tokens, whichever rank dies, hangs, or switches its role."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster_process import ROOT, ClusterProcess, pools_in_use, wait_until
from golden_jobs import Job, golden_jobs
from test_exactness import Answer, check, run
from test_joining import joined

from cluster.ray_session.defaults import ENVIRONMENT

pytestmark = pytest.mark.timeout(400)

GROUP = "decode-9"
SETTINGS = ("--set", "worker.kv_memory_bytes=40000000", "--set", "router.max_local_prefill_tokens=0")
PARALLEL = (
    "--set",
    "worker.parallel.expert_parallel=2",
    "--set",
    "ray.rank_placement=spread",
)
RAYLET = """
import sys
from cluster.ray_session.session import loopback_only
from ray.scripts.scripts import cli
with loopback_only():
    cli(["start", "--address", sys.argv[1], "--node-ip-address", "127.0.0.1", "--num-cpus", "1",
          "--object-store-memory", "80000000", "--disable-usage-stats", "--block"])
"""
"""A further node of a running Ray, on this machine and bound to the loopback address."""


@contextmanager
def second_node(cluster: ClusterProcess) -> Iterator[None]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster.token_file}
    environment = {**os.environ, **ENVIRONMENT, **token}
    command = [sys.executable, "-c", RAYLET, cluster.ray_address]
    node = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert node.stdout is not None
    said = ""
    for line in node.stdout:
        said += line
        if "Ray runtime started" in line:
            break
    else:
        raise AssertionError(said)
    try:
        yield
    finally:
        node.terminate()
        node.stdout.read()
        node.wait(60)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    """Two prefill workers of one rank each and one decode worker, a group of two that has joined over two Ray nodes."""
    running = ClusterProcess("--prefill", "1", "--decode", "1", "--no-dashboard", *SETTINGS)
    arguments = ("--name", GROUP, "--role", "decode", "--ray-address", running.ray_address)
    try:
        with second_node(running), joined("worker", *arguments, *SETTINGS, *PARALLEL):
            wait_until(lambda: GROUP in running.workers(), f"{GROUP} to be connected")
            assert running.switch_role("decode-0", "prefill").returncode == 0
            yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    """Requests long enough to be struck in the middle, and the tokens that one process without ranks gives."""
    return make_jobs(2027)


@pytest.fixture(scope="module")
def fresh_jobs() -> list[Job]:
    """Others like them, which no worker has in its cache yet."""
    return make_jobs(2028)


def make_jobs(seed: int) -> list[Job]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(300, 1400) for _ in range(length)] for length in (1, 30, 70, 100, 129, 200, 300, 450)]
    settings: list[dict[str, Any]] = [
        {"max_tokens": 90, "seed": index, "temperature": 0.9 if index % 4 else 0.0, "top_p": 1.0}
        for index in range(len(prompts))
    ]
    return golden_jobs(list(zip(prompts, settings, strict=True)), kv_memory_bytes=100_000_000)


def ranks(cluster: ClusterProcess, worker_id: str = GROUP) -> dict[int, int]:
    """Process ids of a whole group's ranks; waits until it is whole."""
    found: dict[int, int] = {}

    def is_whole() -> bool:
        status = cluster.workers().get(worker_id)
        if status is None or status["is_rebuilding"]:
            return False
        found.update({rank["rank"]: rank["pid"] for rank in status["ranks"] if rank["is_alive"]})
        return len(status["ranks"]) == 2 and all(rank["is_alive"] and rank["epoch"] for rank in status["ranks"])

    wait_until(is_whole, f"{worker_id} to be whole", lambda: str(cluster.get("/admin/status")["workers"]))
    return found


def strike(cluster: ClusterProcess, jobs: list[Job], rank: int, number: int) -> tuple[list[Answer], dict[str, Any]]:
    """Sends a signal to a rank once half of the tokens have come; returns the answers, and what the group was before."""
    before = cluster.workers()[GROUP] | {"pids": ranks(cluster)}
    act: Callable[[], None] = lambda: os.kill(before["pids"][rank], number)  # noqa: E731
    return run(cluster, jobs, {40 * len(jobs): act}), before


def test_a_group_decodes_what_workers_of_one_rank_prefilled(cluster: ClusterProcess, jobs: list[Job]) -> None:
    answers = run(cluster, jobs)
    check(jobs, answers)
    reports = [answer.trace["choices"][0] for answer in answers]
    assert {report["decode_worker"] for report in reports} == {GROUP}
    moved = [report for report in reports if report["transport"] == "shm"]
    assert len(moved) >= 5 and {report["prefill_worker"] for report in moved} <= {"prefill-0", "decode-0"}
    shown = cluster.baton("status", "--url", cluster.url).stdout
    assert f"{GROUP}/rank-0" in shown and f"{GROUP}/rank-1" in shown
    cluster.wait_idle(3)


def test_the_ranks_of_a_group_live_on_different_ray_nodes(cluster: ClusterProcess) -> None:
    raylets = {parent_of(pid) for pid in ranks(cluster).values()}
    assert len(raylets) == 2, "a rank's process is the child of its node"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_lost_rank_changes_no_token_and_is_replaced(
    cluster: ClusterProcess, jobs: list[Job], number: signal.Signals
) -> None:
    answers, before = strike(cluster, jobs, 1, number)
    check(jobs, answers)
    now = ranks(cluster)
    assert now[0] == before["pids"][0], "the healthy rank was not restarted"
    assert now[1] != before["pids"][1]
    status = cluster.workers()[GROUP]
    assert status["generation"] == before["generation"] + 1
    assert status["counters"]["rebuilds"] == before["counters"]["rebuilds"] + 1
    assert cluster.get("/admin/status")["counters"]["replayed_tokens"] > 0
    print(f"{number.name}: {status['counters']['rebuild_seconds'] - before['counters']['rebuild_seconds']:.2f} s")
    cluster.wait_idle(3)


def test_a_lost_leader_finds_its_rank_again_with_its_weights(cluster: ClusterProcess, jobs: list[Job]) -> None:
    answers, before = strike(cluster, jobs, 0, signal.SIGKILL)
    check(jobs, answers)
    now = ranks(cluster)
    assert now[0] != before["pids"][0]
    assert now[1] == before["pids"][1], "the rank that was left waited for the new leader"
    assert cluster.workers()[GROUP]["generation"] >> 32 > before["generation"] >> 32
    cluster.wait_idle(3)


def test_a_group_switches_to_prefill_for_a_worker_of_one_rank(cluster: ClusterProcess, fresh_jobs: list[Job]) -> None:
    before = ranks(cluster)
    for worker_id, role in (("decode-0", "decode"), (GROUP, "prefill"), ("prefill-0", "decode")):
        switched = cluster.switch_role(worker_id, role)
        assert switched.returncode == 0, switched
    answers = run(cluster, fresh_jobs)
    check(fresh_jobs, answers)
    reports = [answer.trace["choices"][0] for answer in answers]
    moved = [report for report in reports if report["transport"] == "shm"]
    assert len(moved) >= 5 and {report["prefill_worker"] for report in moved} == {GROUP}, (reports, cluster.workers())
    assert ranks(cluster) == before
    cluster.wait_idle(3)


def test_afterwards_each_worker_has_one_pool_whatever_its_ranks(cluster: ClusterProcess) -> None:
    everyone = all_processes()
    alive = {worker["pid"] for worker in cluster.workers().values()} | set(ranks(cluster).values())

    def pools() -> dict[int, set[int]]:
        return {pool: users for pool, users in pools_in_use(everyone).items() if users & alive}

    wait_until(lambda: len(pools()) == 3, "one pool a worker", lambda: str((alive, pools())))
    both = set(ranks(cluster).values())
    assert any(both <= users for users in pools().values()), "the ranks of the group share one"


def all_processes() -> set[int]:
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
