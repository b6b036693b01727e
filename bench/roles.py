"""Switches of roles on a real cluster of four small workers: how long they take, idle and loaded, and that automatic ones under load with kills change no token.

python bench/roles.py --switches 60
python bench/roles.py --switches 500 --automatic-only --json roles.json

One run: (1) an idle worker is switched to and fro; (2) a decode worker with 16 running sequences becomes a prefill worker while other streams run on the other one, whose time
between tokens is measured with and without the switch; (3) the controller, set to change its mind often, switches under loads that alternate between prompts and answers, a worker is killed
now and then, and every answer is compared with the one of a single process. Its targets are a little less than what both loads take with the roles that it begins with, so that no split
keeps them and none misses them altogether. Times of switches are those of the audit in the store: from intended to done.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "e2e"))

import httpx
from cluster_process import ClusterProcess, wait_until
from golden_jobs import Job, golden_jobs

NUM_WORKERS = 4
RESTLESS = {
    "mode": "auto",
    "min_gain": 0.001,
    "interval_s": 0.2,
    "cooldown_s": 0.1,
    "reversal_s": 0.1,
    "worker_rest_s": 0.3,
    "manual_rest_s": 0.3,
    "switches_per_hour": 36000,
}
"""The controller changes its mind whenever it can."""
TIGHT = 0.85
"""Its targets, in relation to the medians that were measured."""
PHASE_S = 10.0
"""So long one kind of load goes on: the controller hears of lengths of the last 8 s."""


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


class Audit:
    """Steps of switches as the router shows them; gathered often, since it shows the last ones only."""

    def __init__(self, cluster: ClusterProcess) -> None:
        self._cluster = cluster
        self.steps: dict[int, dict[str, Any]] = {}
        self.reasons: Counter[str] = Counter()
        """Of the last look, whenever it was asked for: why roles stay or change."""

    def gather(self) -> None:
        page = self._cluster.get("/admin/roles")
        for step in page.get("audit", ()):
            self.steps[step["number"]] = step
        if page.get("last_look"):
            self.reasons[page["last_look"]["reason"]] += 1

    def switches(self, by: str) -> list[dict[str, dict[str, Any]]]:
        """Steps by phase of each switch that has ended."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for _, step in sorted(self.steps.items()):
            if step["by"] == by:
                found.setdefault(step["switch"], {})[step["step"]] = step
        return [steps for steps in found.values() if {"done", "rolled_back"} & steps.keys()]


def took_s(steps: dict[str, dict[str, Any]]) -> float:
    """From intended to done."""
    return float(sum(step["took_s"] for step in steps.values()))


def idle_switches(cluster: ClusterProcess, audit: Audit, count: int) -> list[float]:
    for at in range(count + count % 2):  # it decodes again in the end
        cluster.post("/admin/workers/decode-1/role", {"role": ("prefill", "decode")[at % 2]})
        time.sleep(0.3)
        audit.gather()
    time.sleep(1.2)
    audit.gather()
    return [took_s(steps) for steps in audit.switches("operator") if "done" in steps]


async def stream(
    client: httpx.AsyncClient, job: Job, gaps: list[tuple[float, str]], firsts: list[float] | None = None
) -> list[int]:
    """One answer's tokens; `gaps` hears each wait between two tokens, and where, and `firsts` that for the first one."""
    body = {
        **{name: value for name, value in job.body.items() if name != "extra_body"},
        **job.body["extra_body"],
        "stream": True,
    }
    tokens: list[int] = []
    own: list[float] = []
    last: float | None = None
    where, begun_s = "", time.monotonic()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[5:])
            assert "error" not in chunk, chunk
            where = (chunk.get("baton") or {}).get("choices", [{}])[0].get("decode_worker", where)
            for choice in chunk.get("choices", ()):
                new = choice.get("token_ids") or []
                if new:
                    now = time.monotonic()
                    if last is not None:
                        own.append((now - last) / len(new))
                    elif firsts is not None:
                        firsts.append(now - begun_s)
                    last = now
                    tokens += new
    gaps += [(gap, where) for gap in own]
    return tokens


def jobs_of(asked: list[tuple[int, int]], seed: int) -> list[Job]:
    """Jobs with so many prompt and output tokens, greedy and seeded ones by turns."""
    rng = random.Random(seed)
    made = []
    for index, (prompt, output) in enumerate(asked):
        sampling: dict[str, Any] = {"temperature": 0.0} if index % 2 else {"temperature": 0.9, "top_p": 0.95}
        tokens = [rng.randrange(300, 1400) for _ in range(prompt)]
        made.append((tokens, {"max_tokens": output, "seed": rng.randrange(2**31), **sampling}))
    jobs: list[Job] = golden_jobs(made, kv_memory_bytes=400_000_000)
    return jobs


async def loaded_switch(cluster: ClusterProcess, jobs: list[Job]) -> tuple[float, float, int]:
    """p99 of the time between two tokens of streams that stay, with and without a switch of the other worker; and how many moved."""

    async def once(switch: bool) -> tuple[float, int]:
        gaps: list[tuple[float, str]] = []
        async with httpx.AsyncClient(base_url=cluster.url, timeout=300) as client:
            streams = [asyncio.create_task(stream(client, job, gaps)) for job in jobs]
            while running(cluster, "decode-0") < 16 or running(cluster, "decode-1") < 1:
                if any(each.done() for each in streams):
                    raise RuntimeError("streams have ended, and decode-0 has never had 16 of them")
                await asyncio.sleep(0.05)
            num_there = running(cluster, "decode-0")
            if switch:
                await asyncio.to_thread(cluster.post, "/admin/workers/decode-0/role", {"role": "prefill"})
            answers = await asyncio.gather(*streams)
        for job, tokens in zip(jobs, answers, strict=True):
            assert tokens == job.golden, "a switch has changed tokens"
        stayed = [gap for gap, where in gaps if where == "decode-1"]
        return quantile(stayed, 0.99), num_there

    before, _ = await once(False)
    during, num_there = await once(True)
    return before, during, num_there


def running(cluster: ClusterProcess, worker_id: str) -> int:
    return int(cluster.workers()[worker_id]["load"]["num_running"])


async def typical(cluster: ClusterProcess, prompts: list[Job], answers: list[Job]) -> dict[str, float]:
    """Targets that are nearly kept: of the first token under the load of prompts, and between tokens under that of answers."""
    found: list[float] = []
    async with httpx.AsyncClient(base_url=cluster.url, timeout=300) as client:
        for jobs in (prompts, answers):
            for _ in range(2):  # what counts is the second time, with everything warm
                firsts: list[float] = []
                gaps: list[tuple[float, str]] = []
                await asyncio.gather(*(stream(client, job, gaps, firsts) for job in jobs))
            found.append(statistics.median(firsts if jobs is prompts else [gap for gap, _ in gaps]))
    return {"ttft_slo_s": round(TIGHT * found[0], 4), "tpot_slo_s": round(TIGHT * found[1], 5)}


async def automatic(
    cluster: ClusterProcess,
    audit: Audit,
    prompts: list[Job],
    answers: list[Job],
    count: int,
    kill_every: int,
    limit_s: float,
) -> Counter[str]:
    """Loads by turns until so many switches have ended; every answer is compared."""
    told: Counter[str] = Counter()
    ends_s = time.monotonic() + limit_s
    rng = random.Random(5)
    killed_at = 0
    async with httpx.AsyncClient(base_url=cluster.url, timeout=300) as client:
        began_s = time.monotonic()
        while time.monotonic() < ends_s:
            jobs = (prompts, answers)[int((time.monotonic() - began_s) / PHASE_S) % 2]
            streams = [asyncio.create_task(stream(client, job, [])) for job in jobs]
            done = len(audit.switches("controller"))
            if kill_every and done >= killed_at + kill_every:
                killed_at = done
                victim = rng.choice(["prefill-0", "prefill-1", "decode-0", "decode-1"])
                workers = await asyncio.to_thread(cluster.workers)
                if victim in workers:
                    os.kill(workers[victim]["pid"], signal.SIGKILL)
                    told["kills"] += 1
            pending = set(streams)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=0.5)
                await asyncio.to_thread(audit.gather)
            for job, one in zip(jobs, streams, strict=True):
                told["requests"] += 1
                told["tokens"] += len(one.result())
                assert one.result() == job.golden, "an automatic switch has changed tokens"
            if len(audit.switches("controller")) >= count:
                break
    return told


def by_order(cluster: ClusterProcess, count: int, result: dict[str, Any]) -> None:
    """Parts (1) and (2)."""
    audit = Audit(cluster)
    idle = idle_switches(cluster, audit, count)
    result["idle_s"] = {"count": len(idle), "p50": statistics.median(idle), "p99": quantile(idle, 0.99)}
    print(
        f"idle worker: {len(idle)} switches, p50 {statistics.median(idle) * 1e3:.1f} ms, p99 {quantile(idle, 0.99) * 1e3:.1f} ms",
        flush=True,
    )
    audit = Audit(cluster)
    audit.gather()
    old = set(audit.steps)
    before, during, num_there = asyncio.run(loaded_switch(cluster, jobs_of([(200, 700)] * 40, 7)))
    time.sleep(1.5)
    audit.gather()
    audit.steps = {number: step for number, step in audit.steps.items() if number not in old}
    (loaded,) = audit.switches("operator")
    result["loaded"] = {
        "sequences": num_there,
        "took_s": took_s(loaded),
        "p99_gap_before_s": before,
        "p99_gap_during_s": during,
    }
    phases = ", ".join(f"{name} after {step['took_s'] * 1e3:.0f} ms" for name, step in loaded.items())
    print(
        f"loaded worker with {num_there} sequences: {took_s(loaded):.3f} s ({phases}); p99 between tokens of streams that stay: {before * 1e3:.1f} ms without, {during * 1e3:.1f} ms with it ({during / before:.2f}x)",
        flush=True,
    )


def flags(settings: dict[str, Any]) -> list[str]:
    return [text for name, value in settings.items() for text in ("--set", f"roles.{name}={value}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=60, help="automatic ones")
    parser.add_argument("--kill-every", type=int, default=20, help="switches; 0: never")
    parser.add_argument("--idle", type=int, default=40, help="switches of an idle worker")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for the automatic switches")
    parser.add_argument("--automatic-only", action="store_true", help="(3) alone, in pieces that a machine can spare")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster is stopped with it
    common = [
        "--prefill",
        "2",
        "--decode",
        "2",
        "--no-dashboard",
        "--set",
        "worker.kv_memory_bytes=120000000",
        "--set",
        "worker.max_num_seqs=32",
    ]
    prompts = jobs_of([(rng_prompt, 6) for rng_prompt in (1500, 2200, 3000) * 5], 8)
    answers = jobs_of([(40, 160)] * 20, 9)
    result: dict[str, Any] = {}

    cluster = ClusterProcess(*common, "--set", "roles.mode=off", "--set", "roles.manual_rest_s=1")
    try:
        targets = asyncio.run(typical(cluster, prompts, answers))
        if not args.automatic_only:
            by_order(cluster, args.idle, result)
    finally:
        cluster.stop()

    result["targets"] = targets
    print(f"targets: {targets}", flush=True)
    cluster = ClusterProcess(*common, *flags(RESTLESS | targets))
    try:
        audit = Audit(cluster)
        began_s = time.monotonic()
        told = asyncio.run(automatic(cluster, audit, prompts, answers, args.switches, args.kill_every, args.limit))
        wait_until(lambda: len(cluster.workers()) == NUM_WORKERS, "all workers")
        ended = audit.switches("controller")
        outcomes = Counter("done" if "done" in steps else "rolled back" for steps in ended)
        result["automatic"] = {**told, "switches": len(ended), **outcomes, "wall_s": time.monotonic() - began_s}
        print(
            f"automatic: {len(ended)} switches ({dict(outcomes)}) in {time.monotonic() - began_s:.0f} s, {told['kills']} kills, {told['requests']} requests, {told['tokens']} tokens, all as of one process",
            flush=True,
        )
        print(f"  looks: {dict(audit.reasons)}", flush=True)
        phases_s: dict[str, list[float]] = {}
        for steps in ended:
            names = list(steps)
            for name, following in itertools.pairwise(names):
                phases_s.setdefault(name, []).append(steps[following]["took_s"])
        for name, times in phases_s.items():
            print(
                f"  {name:<10} {len(times):>4}  p50 {statistics.median(times) * 1e3:7.1f} ms  p99 {quantile(times, 0.99) * 1e3:7.1f} ms",
                flush=True,
            )
        result["phases"] = {
            name: {"count": len(times), "p50": statistics.median(times), "p99": quantile(times, 0.99)}
            for name, times in phases_s.items()
        }
    finally:
        cluster.stop()
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
