"""Fixtures of the end-to-end tests: one cluster for all of them, and the golden tokens of one process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from cluster_process import ClusterProcess, free_port
from golden_jobs import Job, golden_jobs

NUM_REQUESTS = 200
NUM_WORKERS = 4
RAY_METRICS_PORT = free_port()


@pytest.fixture(scope="session")
def cluster() -> Iterator[ClusterProcess]:
    """Two prefill and two decode workers behind a router, with pools too small to cache what the tests repeat."""
    running = ClusterProcess(
        "--prefill",
        "2",
        "--decode",
        "2",
        "--no-dashboard",
        "--set",
        "worker.kv_memory_bytes=50000000",
        "--set",
        "worker.transfer_timeout_s=5",
        "--set",
        "router.max_local_prefill_tokens=0",
        "--set",
        f"ray.metrics_port={RAY_METRICS_PORT}",
    )
    yield running
    running.stop()


@pytest.fixture(scope="session")
def jobs() -> list[Job]:
    """200 requests of 1 to 3,000 prompt tokens, greedy and seeded, some sharing prefixes, run by one engine in this process."""
    import torch

    torch.set_num_threads(1)
    rng = random.Random(2026)
    asked: list[tuple[list[int], dict[str, Any]]] = []
    shared = [rng.randrange(300, 1400) for _ in range(3000)]
    for index in range(NUM_REQUESTS):
        length = (1, 2, 63, 64, 65, 128, 3000)[index] if index < 7 else round(3000 ** rng.random())
        start = rng.choice([0, 0, length // 2, length])
        prompt = shared[:start] + [rng.randrange(300, 1400) for _ in range(length - start)]
        form = {"structured_outputs": {"regex": "([a-z]{2,9} )+"}} if index % 5 == 2 else {}
        max_tokens = rng.randrange(1, 49)
        sampling: dict[str, Any] = {"temperature": 0.0} if index % 2 else {"temperature": 0.9, "top_p": 0.95}
        if index % 6 == 0:
            sampling |= {"presence_penalty": 0.5, "frequency_penalty": 0.3}
        asked.append((prompt, {"max_tokens": max_tokens, "seed": rng.randrange(2**31), **sampling, **form}))
    return golden_jobs(asked, kv_memory_bytes=400_000_000)
