"""Draining and switching a worker in the middle of streams moves them away: every client gets its golden tokens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from cluster_process import ClusterProcess, wait_until
from conftest import NUM_WORKERS
from golden_jobs import Job, golden_jobs
from test_exactness import check, run

pytestmark = pytest.mark.timeout(400)

NUM_STREAMS = 8
BUSY_S = 10.0
MAX_TOKENS = 800
NUM_TRIES = 3
"""A loaded machine may be so slow to act that the streams have ended; then it is done again."""


@pytest.fixture(scope="module")
def long_jobs() -> list[Job]:
    """Streams that last: prompts of different lengths, long answers, greedy and seeded, with penalties and logprobs."""
    import torch

    torch.set_num_threads(1)
    rng = random.Random(4)
    asked: list[tuple[list[int], dict[str, Any]]] = []
    for index in range(NUM_STREAMS):
        prompt = [rng.randrange(300, 1400) for _ in range((3, 64, 200, 700)[index % 4])]
        sampling: dict[str, Any] = {"temperature": 0.0} if index % 3 == 0 else {"temperature": 0.9, "top_p": 0.95}
        if index % 2:
            sampling |= {"presence_penalty": 0.5, "frequency_penalty": 0.3}
        if index % 4 == 1:
            sampling["structured_outputs"] = {"regex": "([a-z]{2,9} )+"}
        asked.append((prompt, {"max_tokens": MAX_TOKENS, "seed": rng.randrange(2**31), **sampling}))
    return golden_jobs(asked, kv_memory_bytes=200_000_000)


def counter(cluster: ClusterProcess, name: str) -> float:
    return float(cluster.get("/admin/status")["counters"].get(name, 0))


def is_busy(cluster: ClusterProcess, worker_id: str) -> bool:
    return bool(cluster.workers()[worker_id]["load"]["num_running"] > 1)


def when_busy(cluster: ClusterProcess, worker_id: str, act: Callable[[], None]) -> Callable[[], None]:
    """Acts once the worker decodes, or after BUSY_S, when the streams have ended unseen: then nothing moves, and the try says so."""

    def event() -> None:
        deadline_s = time.monotonic() + BUSY_S
        while not is_busy(cluster, worker_id) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        act()

    return event


def test_draining_in_mid_stream_moves_the_streams_and_empties_the_worker(
    cluster: ClusterProcess, long_jobs: list[Job]
) -> None:
    drained: list[subprocess.CompletedProcess[str]] = []
    held: list[dict[str, Any]] = []

    def drain() -> None:
        cluster.post("/admin/workers/decode-1/drain", {})
        drained.append(cluster.baton("drain", "decode-1", "--url", cluster.url, "--timeout", "90"))
        held.append(cluster.workers()["decode-1"])

    def try_once() -> bool:
        before = counter(cluster, "migrations_done")
        cluster.post("/admin/workers/decode-1/drain", {"drain": False})
        answers = run(cluster, long_jobs, {NUM_STREAMS * 2: when_busy(cluster, "decode-1", drain)})
        check(long_jobs, answers)
        assert drained[-1].returncode == 0 and "is drained" in drained[-1].stdout, drained[-1]
        assert held[-1]["is_draining"] and held[-1]["counters"]["held_blocks"] == 0
        return counter(cluster, "migrations_done") > before

    assert any(try_once() for _ in range(NUM_TRIES)), "nothing moved: the streams were too short"
    more = run(cluster, long_jobs[:4])
    check(long_jobs[:4], more)
    assert {answer.trace["choices"][0]["decode_worker"] for answer in more} == {"decode-0"}
    table = cluster.baton("status", "--url", cluster.url).stdout
    assert "draining" in next(line for line in table.splitlines() if line.startswith("decode-1"))
    refused = cluster.baton("drain", "decode-0", "--url", cluster.url)
    assert refused.returncode == 2 and "no worker could decode" in refused.stderr


def test_a_drained_worker_that_is_killed_comes_back_drained_until_that_is_undone(
    cluster: ClusterProcess, long_jobs: list[Job]
) -> None:
    before = cluster.workers()["decode-1"]
    assert before["is_draining"]
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = cluster.workers().get("decode-1")
        return now is not None and now["generation"] > before["generation"]

    wait_until(is_back, "decode-1 to be restarted")
    assert cluster.workers()["decode-1"]["is_draining"]
    assert cluster.baton("drain", "decode-1", "--undo", "--url", cluster.url).returncode == 0
    assert not cluster.workers()["decode-1"]["is_draining"]
    answers = run(cluster, long_jobs)
    check(long_jobs, answers)
    assert "decode-1" in {answer.trace["choices"][0]["decode_worker"] for answer in answers}
    cluster.wait_idle(NUM_WORKERS)


def test_a_role_switch_moves_the_streams_to_the_other_decode_worker(
    cluster: ClusterProcess, long_jobs: list[Job]
) -> None:
    def switch() -> None:
        cluster.post("/admin/workers/decode-0/role", {"role": "prefill"})

    def try_once() -> bool:
        before = counter(cluster, "migrations_done")
        answers = run(cluster, long_jobs, {NUM_STREAMS * 2: when_busy(cluster, "decode-0", switch)})
        check(long_jobs, answers)
        assert cluster.switch_role("decode-0", "decode").returncode == 0
        return counter(cluster, "migrations_done") > before

    assert any(try_once() for _ in range(NUM_TRIES)), "nothing moved: the streams were too short"
    cluster.wait_idle(NUM_WORKERS)


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"])
def test_a_worker_that_is_killed_while_streams_move_changes_no_token(
    cluster: ClusterProcess, long_jobs: list[Job], victim: str
) -> None:
    """decode-1 drains to decode-0: once the target is killed in the middle of it, once the source."""

    def try_once() -> bool:
        pid = cluster.workers()[victim]["pid"]
        begun = counter(cluster, "migrations_begun")
        is_killed = False

        def drain_and_kill() -> None:
            nonlocal is_killed
            deadline = time.monotonic() + BUSY_S
            while not is_busy(cluster, "decode-1"):
                if time.monotonic() > deadline:  # its streams ended before that was seen
                    return
            cluster.post("/admin/workers/decode-1/drain", {"force": True})
            deadline = time.monotonic() + 5.0  # the streams may have ended: then it is killed without one under way
            while counter(cluster, "migrations_begun") == begun and time.monotonic() < deadline:
                pass
            os.kill(pid, signal.SIGKILL)
            is_killed = True

        answers = run(cluster, long_jobs, {NUM_STREAMS * 2: drain_and_kill})
        check(long_jobs, answers)
        if not is_killed:
            return False
        # The streams may have ended before it was killed, and then the router still counts it for a moment.
        wait_until(lambda: cluster.workers().get(victim, {}).get("pid", pid) != pid, "the victim to be back")
        undone = cluster.baton("drain", "decode-1", "--undo", "--url", cluster.url)
        assert undone.returncode == 0, undone
        return True

    assert any(try_once() for _ in range(NUM_TRIES)), "decode-1 was never seen busy"
    cluster.wait_idle(NUM_WORKERS)
