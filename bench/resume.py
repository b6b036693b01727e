"""Kills routers, and workers beside them, under streams, and measures how long a resumed client waits for its next event.

Several routers share one port. Every client goes through router.resume, one stream after the other, and its answers must be the
golden tokens of one engine in this process. The gap of a stream that had begun is from its broken connection to its next event; where its worker was
killed too, the answer is computed again in it. At the end all workers must be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

from cluster_process import ClusterProcess
from golden_jobs import Job, golden_jobs

from router.resume import ResumingClient


def jobs_of(count: int, max_tokens: int, seed: int) -> list[Job]:
    rng = random.Random(seed)
    asked: list[tuple[list[int], dict[str, Any]]] = []
    for index in range(count):
        sampling: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95} if index % 2 else {"temperature": 0.0}
        prompt = [rng.randrange(300, 1400) for _ in range(rng.choice([3, 64, 200]))]
        asked.append((prompt, {"max_tokens": max_tokens, "seed": rng.randrange(2**31), **sampling}))
    jobs: list[Job] = golden_jobs(asked, kv_memory_bytes=200_000_000)
    return jobs


def pids(cluster: ClusterProcess, kind: str) -> list[int]:
    """Of the cluster's actors of one kind."""
    found = []
    for pid in cluster.descendants():
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::{kind}".encode()):
                found.append(pid)
        except OSError:
            continue
    return found


def kill_one(cluster: ClusterProcess, kind: str, rng: random.Random) -> bool:
    """One of several: the last one of its kind is left."""
    there = pids(cluster, kind)
    if len(there) < 2:
        return False
    os.kill(rng.choice(there), signal.SIGKILL)
    return True


def share(values: list[float], at: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(at * len(ordered)))] if ordered else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=300, help="at once")
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two kills of a router")
    parser.add_argument("--worker-every", type=float, default=15.0)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, jobs = random.Random(args.seed), jobs_of(16, args.tokens, args.seed)
    cluster = ClusterProcess(
        "--routers", str(args.routers), "--prefill", "0", "--decode", "0", "--mixed", str(args.workers),
        "--set", f"worker.max_num_seqs={args.streams}", "--set", "router.max_lost_workers=100",
    )  # fmt: skip
    is_over, lock = threading.Event(), threading.Lock()
    gaps: list[float] = []
    counts = {"answers": 0, "wrong": 0, "failed": 0, "routers_killed": 0, "workers_killed": 0}

    def client(number: int) -> None:
        turn = number
        while not is_over.is_set():
            job, turn = jobs[turn % len(jobs)], turn + 1
            body = dict(job.body)
            body = {**body, **body.pop("extra_body"), "trace": False}
            tokens: list[int] = []
            with ResumingClient(cluster.url, give_up_s=120.0) as resuming:
                outcome = "answers"
                try:
                    for event in resuming.stream("/v1/completions", body):
                        tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
                    if tokens != job.golden:
                        outcome = "wrong"
                except Exception as error:
                    outcome = "failed"
                    print(f"client {number}: {error!r}", file=sys.stderr)
                with lock:
                    counts[outcome] += 1
                    gaps.extend(resuming.gaps_s)

    try:
        with ThreadPoolExecutor(args.streams) as pool:
            running = [pool.submit(client, number) for number in range(args.streams)]
            begun = time.monotonic()
            next_worker = begun + args.worker_every
            time.sleep(min(3.0, args.every))
            while time.monotonic() - begun < args.seconds:
                counts["routers_killed"] += kill_one(cluster, "RouterActor", rng)
                if time.monotonic() >= next_worker:
                    next_worker += args.worker_every
                    counts["workers_killed"] += kill_one(cluster, "WorkerActor", rng)
                time.sleep(args.every)
            is_over.set()
            for each in running:
                each.result()
        cluster.wait_idle(args.workers)
    finally:
        cluster.stop()
    print(
        json.dumps(
            counts | {"resumed": len(gaps)} | {f"gap_s_p{at}": round(share(gaps, at / 100), 3) for at in (50, 90, 99)}
        )
    )
    return 1 if counts["wrong"] or counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
