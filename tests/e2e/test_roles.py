"""Roles that change by themselves under load, with a worker and the leading router killed in between, change no token."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError

import pytest
from cluster_process import ClusterProcess, wait_until
from golden_jobs import Job, golden_jobs
from test_exactness import check, run

pytestmark = pytest.mark.timeout(400)

NUM_TRIES = 4
RESTLESS = (
    "mode=auto", "ttft_slo_s=0.05", "tpot_slo_s=0.02", "min_gain=0.001", "interval_s=0.2", "cooldown_s=0.1", "reversal_s=0.1",
    "worker_rest_s=0.3", "manual_rest_s=0.3", "switches_per_hour=36000",
)  # fmt: skip
"""The controller changes its mind whenever it can."""


@pytest.fixture(scope="module")
def restless() -> Iterator[ClusterProcess]:
    flags = [text for setting in RESTLESS for text in ("--set", f"roles.{setting}")]
    running = ClusterProcess(
        "--prefill", "1", "--decode", "2", "--no-dashboard", "--set", "worker.kv_memory_bytes=60000000", *flags
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def shifting_jobs() -> list[Job]:
    """Long prompts with short answers, then short prompts with long answers."""
    import torch

    torch.set_num_threads(1)
    rng = random.Random(12)
    asked: list[tuple[list[int], dict[str, Any]]] = []
    for index in range(60):
        prompt, output = (2500, 4) if index < 30 else (30, 200)
        tokens = [rng.randrange(300, 1400) for _ in range(prompt)]
        sampling: dict[str, Any] = {"temperature": 0.0} if index % 2 else {"temperature": 0.9, "top_p": 0.95}
        asked.append((tokens, {"max_tokens": output, "seed": rng.randrange(2**31), **sampling}))
    return golden_jobs(asked, kv_memory_bytes=400_000_000)


def switches(cluster: ClusterProcess) -> int:
    """Automatic ones that are done, as the audit in the store has it."""
    steps = cluster.get("/admin/roles").get("audit", [])
    return sum(step["by"] == "controller" and step["step"] == "done" for step in steps)


def test_automatic_switches_and_a_killed_worker_in_between_change_no_token(
    restless: ClusterProcess, shifting_jobs: list[Job]
) -> None:
    def kill(worker_id: str) -> Callable[[], None]:
        return lambda: os.kill(restless.workers()[worker_id]["pid"], signal.SIGKILL)

    for number in range(NUM_TRIES):
        check(shifting_jobs, run(restless, shifting_jobs, {200: kill("decode-1")} if number == 1 else None))
        wait_until(lambda: len(restless.workers()) == 3, "all workers")
        if number and switches(restless) >= 2:
            break
        # A fast host has no reason to go back by itself: one decode worker is enough for all answers there.
        for worker_id, worker in restless.workers().items():
            if worker["role"] != worker_id.partition("-")[0]:
                with suppress(HTTPError):  # it is switching just now
                    restless.post(f"/admin/workers/{worker_id}/role", {"role": worker_id.partition("-")[0]})
    assert switches(restless) >= 2, restless.get("/admin/roles")
    decisions = restless.get("/admin/roles")["decisions"]
    assert decisions and all(d["inputs"] and d["alternatives"] and d["moves"] for d in decisions)
    roles = [worker["role"] for worker in restless.workers().values()]
    assert {"prefill", "mixed"} & set(roles) and {"decode", "mixed"} & set(roles)
    explained = restless.baton("roles", "--explain", "--url", restless.url)
    assert explained.returncode == 0 and "alternatives" in explained.stdout and "done" in explained.stdout


def test_an_operator_pins_a_worker_and_the_controller_leaves_it_alone(
    restless: ClusterProcess, shifting_jobs: list[Job]
) -> None:
    pinned = restless.baton("switch-role", "prefill-0", "mixed", "--pin", "--url", restless.url)
    assert pinned.returncode == 0, pinned.stderr
    generation = restless.workers()["prefill-0"]["generation"]
    check(shifting_jobs, run(restless, shifting_jobs))
    worker = restless.workers()["prefill-0"]
    assert (worker["role"], worker["generation"]) == ("mixed", generation)
    assert restless.baton("roles", "--unpin", "prefill-0", "--url", restless.url).returncode == 0
    table = restless.baton("roles", "--url", restless.url).stdout
    assert "prefill-0" in table and "auto, decided by router-0" in table
