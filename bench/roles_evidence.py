"""Goodput of the role controller beside every static split, the best of them in hindsight, an oracle, and two published policies, in the simulator.

python bench/roles_evidence.py --trace generated:requests=7200,rate=24,prompt=3000,output=300,turns=1,shift=1 --plot roles.svg
python bench/roles_evidence.py --trace ../shared/traces/mooncake_conversation.jsonl --speed 8 --window 120

(b) is every split in --splits, fixed; (d) the best of them, chosen with hindsight. (e) is Baton's controller, which begins with --start; the published policies begin
there as well, and their switches are carried out by the same machine. Goodput: requests that ended within both targets, over the time in which requests came. The oracle
has, in each window of --oracle seconds by arrival, the best of the static splits in that window: it knows the future and switches for nothing. Out of SLO: the share of
windows in which less than nine of ten requests were good; after a shift: the seconds of such windows in the minute behind a shift of the generated load.
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
from cluster.roles.planner import RoleController
from cluster.sim.load import TraceRequest
from cluster.sim.profiles.published import published_profile
from cluster.sim.record import RunRecord
from cluster.sim.report.plots import COLORS, new_figure
from cluster.sim.settings import Settings
from cluster.sim.simulation import MakePlanner, Simulation
from cluster.sim.traces.files import read_trace
from cluster.sim.traces.generated import PREFIX, generate, recipe_of

ENOUGH = 0.9
"""Of the requests of a window: with less it is out of SLO."""
WINDOW_BYTES = 1 << 30
"""KV that may be under way at once in a handoff (bench/routing_evidence.py)."""
BEHIND_S = 60.0
"""So long after a shift the time out of SLO is counted."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one way to give roles."""

    name: str
    goodput: float
    share: float
    out_of_slo: float
    late_s: float
    """Out of SLO in the minute after a shift, for each shift on average."""
    num_switches: int
    good: dict[int, int]
    """Good requests by window."""
    prefill: list[tuple[float, int]]
    """PREFILL workers by time."""


class Bench:
    """One trace."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.profile = published_profile(args.profile)
        self.shifts_s: list[float] = []
        if args.trace.startswith(PREFIX):
            recipe = recipe_of(args.trace)
            trace: Iterable[TraceRequest] = generate(recipe, args.seed, self.profile.max_model_len)
            if recipe.shift:
                length_s = recipe.requests / recipe.rate / args.speed
                self.shifts_s = [length_s / 3, length_s * 2 / 3]
        else:
            trace = read_trace(Path(args.trace))
        squeezed = (replace(one, at_s=one.at_s / args.speed) for one in trace)
        self.requests = list(takewhile(lambda one: one.at_s < args.window, squeezed) if args.window else squeezed)
        self.span_s = max(1.0, self.requests[-1].at_s)
        self.asked: dict[int, int] = {}
        for one in self.requests:
            window = int(one.at_s / args.oracle)
            self.asked[window] = self.asked.get(window, 0) + 1
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
            worker={"transfer_window_bytes": WINDOW_BYTES},
            roles=RolesConfig(mode="auto") if planner is not None else None,
        )
        began_s = time.process_time()
        record = Simulation(settings, self.requests, (), None, *([planner] if planner is not None else [])).run()
        found = self._figures(name, split, record)
        self.runs.append(found)
        ttft = quantile([one.ttft_s for one in record.requests if one.ttft_s is not None], 0.9)
        tpot = quantile([one.tpot_s for one in record.requests if one.tpot_s is not None], 0.9)
        after = f"{found.late_s:.0f}" if self.shifts_s else "-"
        print(
            f"| {name} | {found.goodput:.2f} | {found.share:.3f} | {ttft:.2f} | {tpot * 1e3:.1f} | {found.out_of_slo:.2f} | {after} "
            f"| {found.num_switches} ({found.num_switches * 3600 / self.span_s:.0f}) | {time.process_time() - began_s:.0f} |",
            flush=True,
        )
        return found

    def _figures(self, name: str, split: tuple[int, int, int], record: RunRecord) -> Run:
        width = self.args.oracle
        good = dict.fromkeys(self.asked, 0)
        for one in record.requests:
            good[min(max(good), int(one.arrival_s / width))] += one.is_good
        out = [window for window, count in self.asked.items() if good[window] < ENOUGH * count]
        late = sum(width for window in out for at_s in self.shifts_s if at_s <= window * width < at_s + BEHIND_S)
        total = sum(good.values())
        roles = {
            f"{role}-{at}": role
            for role, count in zip(("prefill", "decode", "mixed"), split, strict=True)
            for at in range(count)
        }
        prefill = [(0.0, split[0])]
        for switch in record.switches:
            roles[switch.worker] = switch.role
            prefill.append((switch.at_s, sum(role == "prefill" for role in roles.values())))
        return Run(
            name,
            total / self.span_s,
            total / max(1, len(record.requests)),
            len(out) / max(1, len(self.asked)),
            late / max(1, len(self.shifts_s)),
            len(record.switches),
            good,
            prefill,
        )

    def oracle(self, statics: list[Run]) -> dict[int, int]:
        """Good requests by window of the best static split of each."""
        return {window: max(run.good[window] for run in statics) for window in self.asked}

    def plot(self, path: Path, shown: list[Run], oracle: dict[int, int]) -> None:
        """Good requests by window and PREFILL workers over time, as PNG or SVG by the file's ending."""
        figure, width = new_figure(11, 7), self.args.oracle
        share, roles = figure.subplots(2, 1, sharex=True)
        windows = sorted(self.asked)
        middle = [(window + 0.5) * width for window in windows]
        colors = [COLORS["decode"], COLORS["prefill"], COLORS["mixed"], "#7c3aed", "#64748b"]
        for run, color in zip(shown, colors, strict=False):
            share.plot(
                middle, [100 * run.good[w] / self.asked[w] for w in windows], label=run.name, color=color, lw=1.3
            )
            times, counts = zip(*run.prefill, (self.span_s, run.prefill[-1][1]), strict=True)
            roles.step(times, counts, where="post", label=run.name, color=color, lw=1.3)
        share.plot(
            middle, [100 * oracle[w] / self.asked[w] for w in windows], label="oracle", color="#94a3b8", ls="--", lw=1
        )
        share.set_ylabel("within targets, %")
        share.set_ylim(0, 103)
        roles.set_ylabel("PREFILL workers")
        roles.set_xlabel("virtual time, s")
        for axis in (share, roles):
            axis.grid(alpha=0.25)
            for at_s in self.shifts_s:
                axis.axvline(at_s, color="#dc2626", ls=":", lw=1)
        share.legend(loc="lower left", fontsize=8, ncols=3)
        figure.savefig(path)


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
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG or SVG, by its ending")
    args = parser.parse_args()
    bench = Bench(args)
    size, start = args.workers, args.start or args.workers // 2
    print(
        f"{Path(args.trace).name}: {len(bench.requests)} requests in {bench.span_s:.0f} s, {size} x {args.profile}, "
        f"ttft {args.ttft:g} s, tpot {args.tpot:g} s\n"
    )
    print(
        "| way | goodput, 1/s | within SLO | TTFT p90, s | TPOT p90, ms | out of SLO | after a shift, s | switches (an hour) | cpu, s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    from_start = f"from {start}:{size - start}"
    ours = bench.run(f"(e) Baton {from_start}", (start, size - start, 0), RoleController)
    if args.only:
        return 0
    published = [bench.run(f"{name} {from_start}", (start, size - start, 0), make) for name, make in POLICIES.items()]
    splits = args.splits or [*(str(max(1, size * part // 8)) for part in range(1, 8)), "mixed"]
    statics = [bench.run(f"(b) {text}", split_called(text, size)) for text in splits]
    best = max(statics, key=lambda run: run.goodput)
    worst = min(statics, key=lambda run: run.goodput)
    oracle = bench.oracle(statics)
    ideal = sum(oracle.values()) / bench.span_s
    summary = {
        "best_static": best.name,
        "over_best": ours.goodput / best.goodput,
        "over_worst": ours.goodput / max(1e-9, worst.goodput),
        "oracle": ideal,
        "regret": 1 - ours.goodput / ideal,
        "published": {run.name: ours.goodput / max(1e-9, run.goodput) for run in published},
    }
    print(
        f"\n(d) best static in hindsight: {best.name}, {best.goodput:.2f}/s. (e) over (d): {summary['over_best']:.3f}; over the worst static, "
        f"{worst.name}: {summary['over_worst']:.2f}; oracle {ideal:.2f}/s, regret {summary['regret']:.3f}"
    )
    if args.json:
        runs = [[run.name, run.goodput, run.share, run.out_of_slo, run.late_s, run.num_switches] for run in bench.runs]
        args.json.write_text(json.dumps({"summary": summary, "runs": runs}, indent=1))
    if args.plot:
        bench.plot(args.plot, [ours, *published, best], oracle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
