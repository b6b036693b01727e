"""What load a cluster carries within an SLO, in the simulator: colocated workers, every static split, round robin, and Baton's policy.

python bench/routing_evidence.py --trace ../shared/traces/mooncake_conversation.jsonl --requests 3000 --rates 14 18 22 26
python bench/routing_evidence.py --trace generated:requests=2000,rate=10,shift=1 --workers 64 --rates 2 4 6 8

A way is a split and a policy. Its curve is the goodput at each of --rates (arrivals of the trace come so many times as fast), its *capacity*
the load at which --attain (0.9) of all requests still end within both targets, between two rates by a straight line. Ways are compared
at equal hardware and equal admission: with `soft` nobody is refused, with `strict` the same router refuses what it cannot keep, whoever routes.
Splits are tried at the middle rate with Baton's policy; the best one gets a curve. Goodput counts over the time in which requests arrive.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.sim.profiles.published import published_profile
from cluster.sim.record import RunRecord
from cluster.sim.settings import Settings
from cluster.sim.simulation import simulate
from cluster.sim.traces.files import read_trace
from cluster.sim.traces.generated import PREFIX, generate, recipe_of

HOPELESS = 0.5
"""A way that keeps fewer of its promises is not tried at a higher rate."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a cluster is split and routed: `prefill` and `decode` workers, the others do both."""

    name: str
    policy: str
    prefill: int = 0
    decode: int = 0
    admission: str = "soft"
    is_colocated: bool = False
    """Every worker computes the prompts of what it decodes: no handoffs, nothing is pulled from peers."""


class Bench:
    """Runs ways over one trace."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.profile = published_profile(args.profile)
        self.rows: list[dict[str, Any]] = []
        if args.trace.startswith(PREFIX):
            self.trace = list(generate(recipe_of(args.trace), args.seed, self.profile.max_model_len))
        else:
            self.trace = read_trace(Path(args.trace))[args.skip : args.skip + args.requests]
        begin_s = self.trace[0].at_s
        self.trace = [replace(one, at_s=one.at_s - begin_s) for one in self.trace]

    def run(self, way: Way, rate: float) -> dict[str, Any]:
        args, requests = self.args, [replace(one, at_s=one.at_s / rate) for one in self.trace]
        settings = Settings(
            profile=self.profile,
            num_prefill=way.prefill,
            num_decode=way.decode,
            num_mixed=args.workers - way.prefill - way.decode,
            seed=args.seed,
            ttft_s=args.ttft,
            tpot_s=args.tpot,
            router={
                "policy": way.policy,
                "max_queue": 1 << 16,
                "ttft_target_s": args.ttft,
                "tpot_target_s": args.tpot,
                "admission": way.admission,
                **({"pull_min_blocks": 0, "max_local_prefill_tokens": 0} if way.is_colocated else {}),
            },
            worker={"local_prefill_tokens": 1 << 24} if way.is_colocated else {},
        )
        began_s = time.process_time()
        record = simulate(settings, requests)
        span_s = max(1.0, requests[-1].at_s)
        row = {
            "way": way.name,
            "admission": way.admission,
            "rate": rate,
            "load": len(requests) / span_s,
            **figures(record, span_s),
            "cpu_s": round(time.process_time() - began_s, 1),
        }
        self.rows.append(row)
        print(
            f"| {row['way']} | {row['admission']} | {rate:g} | {row['load']:.1f} | {row['goodput']:.1f} | {row['share']:.3f} "
            f"| {row['ttft_p50']:.2f} / {row['ttft_p90']:.2f} | {row['tpot_p50'] * 1e3:.1f} / {row['tpot_p90'] * 1e3:.1f} "
            f"| {row['cached']:.2f} | {row['refused']} | {row['local']} |",
            flush=True,
        )
        return row

    def curve(self, way: Way) -> list[dict[str, Any]]:
        """Rows at rising rates, until nothing can be hoped for."""
        rows: list[dict[str, Any]] = []
        for rate in self.args.rates:
            rows.append(self.run(way, rate))
            if rows[-1]["share"] < HOPELESS:
                break
        return rows


def capacity(rows: list[dict[str, Any]], attain: float) -> float:
    """Requests a second at which so many are within the SLO; 0: not at any of the rates. What even the highest rate keeps is a bound."""
    best, before = 0.0, (0.0, 1.0)
    for row in rows:
        load, share = row["load"], row["share"]
        if share >= attain:
            best = load
        elif before[1] >= attain:
            best = before[0] + (load - before[0]) * (before[1] - attain) / (before[1] - share) if before[0] else 0.0
            break
        before = (load, share)
    return best


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


def splits(num_workers: int, given: list[str] | None) -> list[tuple[int, int]]:
    """Prefill and decode workers; what they leave does both. All of them mixed is the first."""
    if given:
        return [(int(prefill), int(decode)) for prefill, _, decode in (text.partition(":") for text in given)]
    step = max(1, num_workers // 8)
    return [(0, 0), *((prefill, num_workers - prefill) for prefill in range(step, num_workers, step))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True)
    parser.add_argument("--skip", type=int, default=0, help="so many requests of the trace, then take")
    parser.add_argument("--requests", type=int, default=3000, help="so many; a generated load is taken as a whole")
    parser.add_argument("--profile", default="h200:21B-A3B:bf16:tp1")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[14.0, 18.0, 22.0, 26.0])
    parser.add_argument("--splits", nargs="+", metavar="P:D", help="default: all mixed, and every eighth")
    parser.add_argument("--ttft", type=float, default=2.0)
    parser.add_argument("--tpot", type=float, default=0.05)
    parser.add_argument("--attain", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soft-only", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    print(
        f"{args.trace}, {len(bench.trace)} requests: {args.workers} x {args.profile}, ttft {args.ttft:g} s, tpot {args.tpot:g} s\n"
    )
    print(
        "| way | admission | rate x | load, 1/s | goodput, 1/s | within SLO | TTFT p50 / p90, s | TPOT p50 / p90, ms | cached | refused | local |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    middle = args.rates[len(args.rates) // 2]
    found = {
        split: bench.run(Way(f"(b) {split[0]}:{split[1]}", "kv_aware", *split), middle)
        for split in splits(args.workers, args.splits)
    }
    best = max(found, key=lambda split: float(found[split]["goodput"]))
    name = "all mixed" if best == (0, 0) else f"{best[0]}:{best[1]}"
    ways = [
        Way("(a) colocated, least loaded", "least_loaded", is_colocated=True),
        Way("(c) colocated, round robin", "round_robin", is_colocated=True),
        Way(f"(d) {name}, Baton", "kv_aware", *best),
    ]
    summary = []
    for admission in ("soft",) if args.soft_only else ("soft", "strict"):
        curves = [bench.curve(replace(way, admission=admission)) for way in ways]
        carried = [capacity(rows, args.attain) for rows in curves]
        peaks = [max(row["goodput"] for row in rows) for rows in curves]
        base, peak = max(carried[:2]), max(peaks[:2])
        ratio = f"{carried[2] / base:.2f}" if base else "-"
        summary.append(
            f"{admission}: capacity {', '.join(f'{value:.1f}' for value in carried)} requests a second for (a), (c), (d), "
            f"ratio {ratio}; highest goodput {', '.join(f'{value:.1f}' for value in peaks)}, ratio {peaks[2] / peak:.2f}"
        )
    print("\n" + "\n".join(summary))
    if args.json:
        args.json.write_text(json.dumps({"rows": bench.rows, "summary": summary}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
