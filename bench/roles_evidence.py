"""Goodput of the role controller beside every static split, the best of them in hindsight, an oracle, and two published policies, in the simulator.

python bench/roles_evidence.py --trace generated:requests=2400,rate=24,prompt=3000,output=300,turns=1,shift=1
python bench/roles_evidence.py --trace ../shared/traces/mooncake_conversation.jsonl --speed 8 --window 120

(b) is every split in --splits, fixed; (d) the best of them, chosen with hindsight. (e) is Baton's controller, which begins with --start; the published policies begin
there as well, and their switches are carried out by the same machine. Goodput: requests that ended within both targets, over the time in which requests came. The oracle
has, in each window of --oracle seconds by arrival, the best of the static splits in that window: it knows the future and switches for nothing. Out of SLO: the share of
windows in which less than nine of ten requests were good.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from role_policies import POLICIES

from cluster.roles.config import RolesConfig
from cluster.sim.load import TraceRequest
from cluster.sim.profiles.published import published_profile
from cluster.sim.record import RunRecord
from cluster.sim.settings import Settings
from cluster.sim.simulation import MakePlanner, Simulation
from cluster.sim.traces.files import read_trace
from cluster.sim.traces.generated import PREFIX, generate, recipe_of

ENOUGH = 0.9
"""Of the requests of a window: with less it is out of SLO."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one way to give roles."""

    name: str
    goodput: float
    share: float
    out_of_slo: float
    switches_per_hour: float
    good: dict[int, int]
    """Good requests by window."""
    row: str


class Bench:
    """One trace."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.profile = published_profile(args.profile)
        if args.trace.startswith(PREFIX):
            trace: Iterable[TraceRequest] = generate(recipe_of(args.trace), args.seed, self.profile.max_model_len)
        else:
            trace = read_trace(Path(args.trace))
        squeezed = (replace(one, at_s=one.at_s / args.speed) for one in trace)
        self.requests = list(takewhile(lambda one: one.at_s < args.window, squeezed) if args.window else squeezed)
        self.span_s = max(1.0, self.requests[-1].at_s)
        self.runs: list[Run] = []

    def run(self, name: str, split: tuple[int, int, int], planner: MakePlanner | None = None) -> Run:
        """`planner` None: roles stay."""
        args = self.args
        router: dict[str, Any] = {"max_queue": 1 << 16, "ttft_target_s": args.ttft, "tpot_target_s": args.tpot}
        settings = Settings(
            profile=self.profile,
            num_prefill=split[0],
            num_decode=split[1],
            num_mixed=split[2],
            seed=args.seed,
            ttft_s=args.ttft,
            tpot_s=args.tpot,
            router=router,
            roles=RolesConfig(mode="auto") if planner is not None else None,
        )
        began_s = time.process_time()
        record = Simulation(settings, self.requests, (), None, *([planner] if planner is not None else [])).run()
        found = self._figures(name, record, time.process_time() - began_s)
        self.runs.append(found)
        print(found.row, flush=True)
        return found

    def _figures(self, name: str, record: RunRecord, cpu_s: float) -> Run:
        width = self.args.oracle
        good: dict[int, int] = {}
        asked: dict[int, int] = {}
        for one in record.requests:
            window = int(one.arrival_s / width)
            asked[window] = asked.get(window, 0) + 1
            good[window] = good.get(window, 0) + one.is_good
        total = sum(good.values())
        ttft = quantile([one.ttft_s for one in record.requests if one.ttft_s is not None], 0.9)
        tpot = quantile([one.tpot_s for one in record.requests if one.tpot_s is not None], 0.9)
        out = sum(good[window] < ENOUGH * count for window, count in asked.items()) / max(1, len(asked))
        per_hour = len(record.switches) * 3600 / self.span_s
        share = total / max(1, len(record.requests))
        row = (
            f"| {name} | {total / self.span_s:.2f} | {share:.3f} | {ttft:.2f} | {tpot * 1e3:.1f} | {out:.2f} "
            f"| {len(record.switches)} | {cpu_s:.0f} |"
        )
        return Run(name, total / self.span_s, share, out, per_hour, good, row)


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def split_called(text: str, workers: int) -> tuple[int, int, int]:
    """`P`, the number of PREFILL workers, or `mixed`."""
    return (0, 0, workers) if text == "mixed" else (int(text), workers - int(text), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True)
    parser.add_argument("--profile", default="h200:21B-A3B:bf16:tp1")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument(
        "--splits", nargs="+", help="PREFILL workers of each static split, or mixed; default: every eighth"
    )
    parser.add_argument("--start", type=int, help="PREFILL workers that (e) begins with; default: half")
    parser.add_argument("--speed", type=float, default=1.0, help="requests come so many times as fast as in the trace")
    parser.add_argument("--window", type=float, default=0.0, help="the first so many seconds, squeezed; 0: all")
    parser.add_argument("--oracle", type=float, default=10.0, help="seconds of a window")
    parser.add_argument("--ttft", type=float, default=2.0)
    parser.add_argument("--tpot", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="store_true", help="(e) alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bench = Bench(args)
    size, start = args.workers, args.start or args.workers // 2
    print(
        f"{args.trace}: {len(bench.requests)} requests in {bench.span_s:.0f} s, {size} x {args.profile}, "
        f"ttft {args.ttft:g} s, tpot {args.tpot:g} s\n"
    )
    print("| way | goodput, 1/s | within SLO | TTFT p90, s | TPOT p90, ms | out of SLO | switches | cpu, s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    from cluster.roles.planner import RoleController

    ours = bench.run(f"(e) Baton from {start}:{size - start}", (start, size - start, 0), RoleController)
    if args.only:
        return 0
    for name, planner in POLICIES.items():
        bench.run(f"{name} from {start}:{size - start}", (start, size - start, 0), planner)
    splits = args.splits or [*(str(max(1, size * part // 8)) for part in range(1, 8)), "mixed"]
    statics = [bench.run(f"(b) {text}", split_called(text, size)) for text in splits]
    best = max(statics, key=lambda run: run.goodput)
    worst = min(statics, key=lambda run: run.goodput)
    windows = {window for run in statics for window in run.good}
    oracle = sum(max(run.good.get(window, 0) for run in statics) for window in windows) / bench.span_s
    print(
        f"\n(d) best static in hindsight: {best.name}, {best.goodput:.2f}/s. (e) over (d): {ours.goodput / best.goodput:.3f}; over the worst static: "
        f"{ours.goodput / max(1e-9, worst.goodput):.2f}; oracle {oracle:.2f}/s, regret {1 - ours.goodput / oracle:.3f}; "
        f"{ours.switches_per_hour:.0f} switches an hour"
    )
    if args.json:
        print(
            json.dumps(
                [[run.name, run.goodput, run.share, run.out_of_slo, run.switches_per_hour] for run in bench.runs]
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
