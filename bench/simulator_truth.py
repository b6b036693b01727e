"""What the simulator predicts beside what a real cluster on this machine does with the same trace: TTFT and TPOT at two loads.

python bench/simulator_truth.py --profile profile.json          baton profile --beside 1 --out profile.json wrote it
python bench/simulator_truth.py --split mixed --rates 2 6

Without --profile it measures one first. Ends with status 1 when a prediction is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import percentile, replay
from sse_client import Measured
from traces import TraceRequest, generate, scale

from cluster.cli import main as baton
from cluster.config import ClusterConfig
from cluster.console.output import StepPrinter
from cluster.lifecycle import launched
from cluster.ray_session.folders import make_folder
from cluster.settings import build
from cluster.sim.load import TraceRequest as SimulatedRequest
from cluster.sim.profiles.files import load_profile
from cluster.sim.profiles.profile import Profile
from cluster.sim.settings import Settings
from cluster.sim.simulation import Simulation

SPLITS = {"split": {"prefill": 1, "decode": 1, "mixed": 0}, "mixed": {"prefill": 0, "decode": 0, "mixed": 2}}
TOLERANCE = 0.15
PERCENTS = (50, 90)


@dataclass(frozen=True)
class Times:
    """Of the requests of one run, in seconds."""

    ttft_s: list[float]
    tpot_s: list[float]

    def figures(self) -> dict[str, float]:
        return {
            f"{name} p{percent}": percentile(values, percent) * 1000
            for name, values in (("TTFT", self.ttft_s), ("TPOT", self.tpot_s))
            for percent in PERCENTS
        }


def measured_times(results: list[Measured]) -> Times:
    """Raises SystemExit when a request failed: there is nothing to compare then."""
    errors = [each.error for each in results if each.error]
    if errors:
        raise SystemExit(f"{len(errors)} requests failed, such as: {errors[0]}")
    tpot = [
        (each.token_times_s[-1] - each.token_times_s[0]) / (each.usage["completion_tokens"] - 1)
        for each in results
        if each.usage["completion_tokens"] > 1
    ]
    return Times([each.token_times_s[0] - each.started_s for each in results], tpot)


def simulated_times(trace: list[TraceRequest], profile: Profile, split: dict[str, int], seed: int) -> Times:
    settings = Settings(
        profile=profile, num_prefill=split["prefill"], num_decode=split["decode"], num_mixed=split["mixed"], seed=seed
    )
    requests = [
        SimulatedRequest(r.arrival_s, r.prefix_ids, r.prefix_tokens, r.input_tokens, r.output_tokens) for r in trace
    ]
    records = Simulation(settings, requests).run().requests
    if any(record.outcome != "ok" for record in records):
        raise SystemExit("a simulated request did not end well")
    return Times(
        [record.ttft_s for record in records if record.ttft_s is not None],
        [record.tpot_s for record in records if record.tpot_s is not None],
    )


async def measure(args: argparse.Namespace, traces: dict[float, list[TraceRequest]]) -> dict[float, list[Times]]:
    """Every load once a round, in one cluster; prompts differ from round to round, so that no cache helps more than in the trace."""
    config = build(
        ClusterConfig,
        {
            "worker": {"model": args.model, "max_model_len": args.max_len},
            "router": {"model": args.model, "port": 0},
            "ray": {"dashboard": False},
            "pools": {**SPLITS[args.split]},
        },
    )
    found: dict[float, list[Times]] = {rate: [] for rate in traces}
    progress = StepPrinter()
    async with launched(config, progress, make_folder()) as cluster:
        vocab_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        settings = argparse.Namespace(concurrency=1024, api_key="", seed=0)
        name = Path(args.model).resolve().name
        await replay(cluster.url, name, next(iter(traces.values()))[:8], vocab_size, settings)
        for turn in range(args.rounds):
            for rate, trace in traces.items():
                progress.say(
                    f"round {turn + 1}: {len(trace)} requests at {rate:g}/s, load average {os.getloadavg()[0]:.1f}"
                )
                settings.seed = 1 + turn * 1000 + int(rate * 100)
                found[rate].append(measured_times(await replay(cluster.url, name, trace, vocab_size, settings)))
    return found


def compare(measured: list[Times], predicted: Times) -> list[dict[str, Any]]:
    """Rows of one load; of several rounds the median counts."""
    rows = []
    rounds = [times.figures() for times in measured]
    for name, value in predicted.figures().items():
        real = statistics.median(each[name] for each in rounds)
        low, high = min(each[name] for each in rounds), max(each[name] for each in rounds)
        rows.append({"figure": name, "measured_ms": real, "low_ms": low, "high_ms": high, "predicted_ms": value,
                     "error": value / real - 1})  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/ernie-4.5-tiny")
    parser.add_argument("--profile", help="of this machine; default: it is measured first")
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default="split", help="1 prefill + 1 decode, or 2 mixed workers"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0, 6.0], help="requests a second; light, and near saturation"
    )
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--max-len", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    traces = {rate: scale(generate(args.requests, args.seed), args.max_len, rate) for rate in args.rates}
    with tempfile.TemporaryDirectory(prefix="baton-truth-") as folder:
        path = args.profile or f"{folder}/profile.json"
        if not args.profile and baton(["profile", "--model", args.model, "--beside", "1", "--out", path]) != 0:
            return 2
        profile = load_profile(path)
        measured = asyncio.run(measure(args, traces))
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "split": args.split,
        "profile": profile.name,
        "loads": {},
    }
    is_close = True
    print(f"{args.split}, {args.requests} requests, {args.rounds} rounds, lengths scaled to {args.max_len} tokens\n")
    print(f"{'rate':>6} {'figure':<10}{'measured ms':>13}{'lowest':>10}{'highest':>10}{'predicted':>11}{'error':>8}")
    for rate, trace in traces.items():
        rows = compare(measured[rate], simulated_times(trace, profile, SPLITS[args.split], args.seed))
        result["loads"][str(rate)] = rows
        for row in rows:
            is_close &= abs(row["error"]) <= TOLERANCE
            print(
                f"{rate:>6g} {row['figure']:<10}{row['measured_ms']:>13.2f}{row['low_ms']:>10.2f}{row['high_ms']:>10.2f}"
                f"{row['predicted_ms']:>11.2f}{row['error']:>8.0%}"
            )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    print(f"\nall within {TOLERANCE:.0%}: {'yes' if is_close else 'no'}")
    return 0 if is_close else 1


if __name__ == "__main__":
    sys.exit(main())
