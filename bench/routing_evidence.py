"""What load a cluster carries within an SLO, in the simulator: colocated workers, every static split, round robin, and Baton's policy.

python bench/routing_evidence.py --trace ../shared/traces/mooncake_conversation.jsonl --requests 3000 --rates 14 18 22 26
python bench/routing_evidence.py --trace generated:requests=2000,rate=10,shift=1 --workers 64 --rates 2 4 6 8

A way is a split and a policy. All ways are compared at the middle one of --rates (arrivals of the trace come so many times as fast). A way's
*capacity* is the load at which --attain (0.9) of all requests still end within both targets, between two rates by a straight line: from the middle
rate on, rates are tried upwards or downwards until two that are next to each other enclose it. Ways are compared at equal hardware and equal
admission: with `soft` nobody is refused, with `strict` the same router refuses what it cannot keep, whoever routes. Splits are tried at the
middle rate with Baton's policy; the best one gets a capacity. Goodput counts over the time in which requests arrive.
"""

from __future__ import annotations

import argparse
import itertools
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

WINDOW_BYTES = 1 << 30
"""KV that may be under way at once in a handoff: with that the pieces of a step travel together, and a simulation has fewer events."""


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
            worker={
                "transfer_window_bytes": WINDOW_BYTES,
                **({"local_prefill_tokens": 1 << 24} if way.is_colocated else {}),
            },
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

    def curve(self, way: Way, middle: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows from the middle rate (`middle`, where there is one already) up or down, until the wanted attainment lies between the last two."""
        rates, at = self.args.rates, len(self.args.rates) // 2
        rows = [middle or self.run(way, rates[at])]
        keeps = rows[0]["share"] >= self.args.attain
        for rate in rates[at + 1 :] if keeps else rates[:at][::-1]:
            rows.append(self.run(way, rate))
            if (rows[-1]["share"] >= self.args.attain) is not keeps:
                break
        return sorted(rows, key=lambda row: float(row["rate"]))


def capacity(rows: list[dict[str, Any]], attain: float) -> float:
    """Requests a second at which so many are within the SLO. Where no two rates enclose it: the highest rate that keeps it, 0: none does."""
    for low, high in itertools.pairwise(rows):
        if low["share"] >= attain > high["share"]:
            part = (low["share"] - attain) / (low["share"] - high["share"])
            return float(low["load"] + part * (high["load"] - low["load"]))
    return max((float(row["load"]) for row in rows if row["share"] >= attain), default=0.0)


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


def named(split: tuple[int, int]) -> str:
    return "all mixed" if split == (0, 0) else f"{split[0]}:{split[1]}"


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
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0], help="rising"
    )
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
        f"{Path(args.trace).name}, {len(bench.trace)} requests: {args.workers} x {args.profile}, ttft {args.ttft:g} s, tpot {args.tpot:g} s\n"
    )
    print(
        "| way | admission | rate x | load, 1/s | goodput, 1/s | within SLO | TTFT p50 / p90, s | TPOT p50 / p90, ms | cached | refused | local |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    middle = args.rates[len(args.rates) // 2]
    found = {
        split: bench.run(Way(f"(b) {named(split)}", "kv_aware", *split), middle)
        for split in splits(args.workers, args.splits)
    }
    best = max(found, key=lambda split: float(found[split]["goodput"]))
    ways = [
        Way("(a) colocated, least loaded", "least_loaded", is_colocated=True),
        Way("(c) colocated, round robin", "round_robin", is_colocated=True),
        Way(f"(d) {named(best)}, Baton", "kv_aware", *best),
    ]
    summary = []
    for admission in ("soft",) if args.soft_only else ("soft", "strict"):
        known = found[best] if admission == "soft" else None
        curves = [bench.curve(replace(way, admission=admission), known if way is ways[-1] else None) for way in ways]
        carried = [capacity(rows, args.attain) for rows in curves]
        at_middle = [next(row["goodput"] for row in rows if row["rate"] == middle) for rows in curves]
        base, goodput = max(carried[:2]), max(at_middle[:2])
        ratio = f"{carried[2] / base:.2f}" if base else "-"
        summary.append(
            f"{admission}: capacity {', '.join(f'{value:.1f}' for value in carried)} requests a second for (a), (c), (d), ratio {ratio}; "
            f"goodput at x {middle:g} {', '.join(f'{value:.1f}' for value in at_middle)}, ratio {at_middle[2] / goodput:.2f}"
        )
    print("\n" + "\n".join(summary))
    if args.json:
        args.json.write_text(json.dumps({"rows": bench.rows, "summary": summary}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
