"""Three routers on one port: a router and a worker are killed under streams, and every client that resumes has exactly the golden answer."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_process import ClusterProcess, wait_until
from golden_jobs import Job, golden_jobs

from router.resume import ResumingClient

pytestmark = pytest.mark.timeout(500)

NUM_JOBS = 12
NUM_STREAMS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    running = ClusterProcess(
        "--routers", "3", "--prefill", "0", "--decode", "0", "--mixed", "2", "--set", "worker.max_num_seqs=64"
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    rng = random.Random(13)
    asked: list[tuple[list[int], dict[str, Any]]] = []
    for index in range(NUM_JOBS):
        prompt = [rng.randrange(300, 1400) for _ in range(rng.choice([3, 64, 200]))]
        sampling: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95} if index % 2 else {"temperature": 0.0}
        asked.append((prompt, {"max_tokens": 400, "seed": rng.randrange(2**31), **sampling}))
    return golden_jobs(asked, kv_memory_bytes=200_000_000)


def body_of(job: Job) -> dict[str, Any]:
    body = dict(job.body)
    return {**body, **body.pop("extra_body"), "trace": False, "stream_options": {"include_usage": True}}


def actors(cluster: ClusterProcess, kind: str) -> list[int]:
    found = []
    for pid in cluster.descendants():
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(f"ray::{kind}".encode()):
            found.append(pid)
    return found


def test_a_router_and_a_worker_are_killed_and_every_client_has_its_answer(
    cluster: ClusterProcess, jobs: list[Job]
) -> None:
    wait_until(lambda: len(actors(cluster, "RouterActor")) == 3, "three routers")
    begun = threading.Semaphore(0)

    def follow(number: int) -> tuple[list[int], str, dict[str, Any], int]:
        job = jobs[number % NUM_JOBS]
        tokens, text, usage = list[int](), "", dict[str, Any]()
        with ResumingClient(cluster.url) as client:
            for event in client.stream("/v1/completions", body_of(job)):
                for choice in event["choices"]:
                    if not tokens:
                        begun.release()
                    tokens += choice["token_ids"]
                    text += choice["text"]
                usage = event["usage"] or usage
            return tokens, text, usage, client.num_resumed

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        running = [pool.submit(follow, number) for number in range(NUM_STREAMS)]
        for _ in range(NUM_STREAMS // 2):
            assert begun.acquire(timeout=120)
        os.kill(random.Random(1).choice(actors(cluster, "RouterActor")), signal.SIGKILL)
        os.kill(actors(cluster, "WorkerActor")[0], signal.SIGKILL)
        answers = [each.result(timeout=300) for each in running]
    for number, (tokens, text, usage, _) in enumerate(answers):
        job = jobs[number % NUM_JOBS]
        assert (tokens, text, usage["completion_tokens"]) == (job.golden, job.text, len(job.golden))
    assert sum(resumed for *_, resumed in answers) > 0
    wait_until(lambda: len(actors(cluster, "RouterActor")) == 3, "the router that was killed is back")
    cluster.wait_idle(2)
