"""Goodput under SLO of colocated workers, of every static split of prefill and decode, of round robin, and of Baton's policy, in the simulator.

python bench/routing_evidence.py --trace ../shared/traces/mooncake_conversation.jsonl
python bench/routing_evidence.py --trace generated:requests=2000,rate=40,shift=1 --workers 64 --window 60

Arrivals of the trace are compressed by a factor: the rate is the one among --rates at which the better of the two baselines (colocated chunked
prefill, least loaded; round robin over the same) has its highest goodput, so the SLO binds there. At that rate every split in --splits runs with the default policy, and
then round robin and Baton's policy, with the targets known to the router, on the best split. Goodput counts requests that ended within both targets,
over the time in which requests arrived. A window is the beginning of the compressed trace.
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

from cluster.sim.load import TraceRequest
from cluster.sim.profiles.published import published_profile
from cluster.sim.record import RunRecord
from cluster.sim.settings import Settings
from cluster.sim.simulation import simulate
from cluster.sim.traces.files import read_trace
from cluster.sim.traces.generated import PREFIX, generate, recipe_of


@dataclass(frozen=True, slots=True)
class Way:
    """How a cluster is split and routed. `num_prefill` 0: all workers do both."""

    name: str
    num_prefill: int
    policy: str
    router: tuple[tuple[str, Any], ...] = ()


class Bench:
    """Runs ways over one trace, each at most once at a rate."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.profile = published_profile(args.profile)
        self.rows: list[dict[str, Any]] = []
        if args.trace.startswith(PREFIX):
            self.trace = list(generate(recipe_of(args.trace), args.seed, self.profile.max_model_len))
        else:
            self.trace = read_trace(Path(args.trace))

    def requests(self, rate: float) -> list[TraceRequest]:
        """The beginning of the compressed trace; a generated load is taken as a whole, since its shifts are to be seen."""
        squeezed: Iterable[TraceRequest] = (replace(one, at_s=one.at_s / rate) for one in self.trace)
        if self.args.trace.startswith(PREFIX):
            return list(squeezed)
        return list(takewhile(lambda one: one.at_s < self.args.window, squeezed))

    def run(self, way: Way, rate: float) -> dict[str, Any]:
        args, requests = self.args, self.requests(rate)
        num_mixed = 0 if way.num_prefill else args.workers
        settings = Settings(
            profile=self.profile,
            num_prefill=way.num_prefill,
            num_decode=args.workers - way.num_prefill if way.num_prefill else 0,
            num_mixed=num_mixed,
            seed=args.seed,
            ttft_s=args.ttft,
            tpot_s=args.tpot,
            router={"policy": way.policy, "max_queue": 1 << 16, **dict(way.router)},
        )
        began_s = time.process_time()
        record = simulate(settings, requests)
        row = {
            "way": way.name,
            "rate": rate,
            **figures(record, max(1.0, requests[-1].at_s)),
            "cpu_s": time.process_time() - began_s,
        }
        self.rows.append(row)
        print(
            f"| {row['way']} | {rate:g} | {row['requests']} | {row['goodput']:.2f} | {row['share']:.3f} | {row['ttft_p50']:.2f} / {row['ttft_p90']:.2f} "
            f"| {row['tpot_p50'] * 1e3:.1f} / {row['tpot_p90'] * 1e3:.1f} | {row['cached']:.2f} | {row['refused']} | {row['local']} |",
            flush=True,
        )
        return row


def figures(record: RunRecord, span_s: float) -> dict[str, Any]:
    """Of one run. Times in seconds; `local`: prompts that were computed where they decode."""
    ttft = sorted(one.ttft_s for one in record.requests if one.ttft_s is not None)
    tpot = sorted(one.tpot_s for one in record.requests if one.tpot_s is not None)
    num_good = sum(one.is_good for one in record.requests)
    prompt_tokens = sum(one.prompt_tokens for one in record.requests if one.first_token_s is not None)
    return {
        "requests": len(record.requests),
        "good": num_good,
        "goodput": num_good / span_s,
        "share": num_good / max(1, len(record.requests)),
        "ttft_p50": quantile(ttft, 0.5),
        "ttft_p90": quantile(ttft, 0.9),
        "tpot_p50": quantile(tpot, 0.5),
        "tpot_p90": quantile(tpot, 0.9),
        "cached": sum(one.cached_tokens for one in record.requests) / max(1, prompt_tokens),
        "refused": sum(one.outcome != "ok" for one in record.requests),
        "local": sum(one.prefill_worker == one.decode_worker != "" for one in record.requests),
    }


def quantile(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True)
    parser.add_argument("--profile", default="h200:21B-A3B:bf16:tp1")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[8.0, 12.0, 16.0, 24.0])
    parser.add_argument(
        "--splits", type=int, nargs="+", help="numbers of prefill workers; default: every eighth of the workers"
    )
    parser.add_argument("--window", type=float, default=20.0, help="virtual seconds")
    parser.add_argument("--ttft", type=float, default=2.0)
    parser.add_argument("--tpot", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bench = Bench(args)
    print(
        f"{args.trace}: {args.workers} x {args.profile}, ttft {args.ttft:g} s, tpot {args.tpot:g} s, {args.window:g} s\n"
    )
    print(
        "| way | rate x | requests | goodput, 1/s | within SLO | TTFT p50 / p90, s | TPOT p50 / p90, ms | cached | refused | local |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    colocated = Way("(a) colocated, least loaded", 0, "least_loaded")
    in_turn = Way("(c) colocated, round robin", 0, "round_robin")
    best_rate, best = 0.0, 0.0
    for rate in args.rates:
        goodput = max(bench.run(way, rate)["goodput"] for way in (colocated, in_turn))
        if goodput > best:
            best_rate, best = rate, goodput
        elif goodput < 0.9 * best:
            break
    targets = (("ttft_target_s", args.ttft), ("tpot_target_s", args.tpot))
    splits = args.splits or [max(1, args.workers * part // 8) for part in range(1, 8)]
    found = {
        split: bench.run(Way(f"(b) {split}:{args.workers - split}", split, "kv_aware"), best_rate) for split in splits
    }
    best_split = max(found, key=lambda split: float(found[split]["goodput"]))
    name = f"{best_split}:{args.workers - best_split}"
    bench.run(Way(f"(c) {name}, round robin", best_split, "round_robin"), best_rate)
    ours = [
        bench.run(Way(f"(d) {name}, {how}", best_split, "kv_aware", (*targets, ("admission", how))), best_rate)
        for how in ("soft", "strict")
    ]
    bench.run(Way("colocated, kv_aware, soft", 0, "kv_aware", targets), best_rate)
    baselines = [row["goodput"] for row in bench.rows if row["rate"] == best_rate and row["way"][:3] in ("(a)", "(c)")]
    ratios = ", ".join(f"{row['goodput'] / max(baselines):.2f}" for row in ours)
    print(f"\nrate x {best_rate:g}; (d) over the better of (a) and (c): {ratios} (soft, strict)")
    if args.json:
        print(json.dumps(bench.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
