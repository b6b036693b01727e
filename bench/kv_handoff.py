"""Speed of Baton's KV transports beside memcpy, a plain socket, raw Gloo, NIXL and Mooncake, between two processes, in one run.

python bench/kv_handoff.py --quick
python bench/kv_handoff.py --peer-python peers/bin/python --json results.json

Prints tables with GB/s, latencies, ratios, and whether each target is met. Baton's figures include the messages that ask for and
announce pieces, and the receiver's verification of each; the sender's checksums count in the latencies only, since otherwise they are
made while the model computes. The others move unchecked bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_report import number, table
from kv_targets import BULK, LATENCIES, SHAPES, SIZES, over, speed, verdicts
from machine_facts import ForeignLoad, machine_facts
from worker_process import Program, WorkerFailed, WorkerProcess

INSTALL = (
    "python3 -m venv peers && peers/bin/pip install numpy && peers/bin/pip install --no-deps nixl nixl-cu12 && "
    "peers/bin/pip install torch==2.13.0 mooncake-transfer-engine-non-cuda (and, for Mooncake, Debian's libibverbs1 librdmacm1)"
)
BATON = ("baton shm", "baton nixl", "baton tcp", "baton tcp sealed", "baton grpc", "baton gloo")
REPEATS = {"64 B": 300, "21B block": 200, "64 KiB": 200, "1 MiB": 150, "16 MiB": 40, "256 MiB": 12}


def programs(peer_python: str) -> list[Program]:
    own, peer = sys.executable, "kv_peer_worker.py"
    return [
        Program("memcpy", own, "kv_plain_worker.py", ("memcpy",)),
        Program("baton shm", own, "kv_baton_worker.py", ("shm",)),
        Program("baton nixl", own, "kv_baton_worker.py", ("nixl",), "pip install 'baton-serve[nixl]'"),
        Program("nixl", peer_python, peer, ("nixl",), INSTALL),
        Program("baton tcp", own, "kv_baton_worker.py", ("tcp",)),
        Program("baton tcp sealed", own, "kv_baton_worker.py", ("tcp", "--seal")),
        Program("plain socket", own, "kv_plain_worker.py", ("socket",)),
        Program("nixl tcp", peer_python, peer, ("nixl", "--ucx-tls", "tcp"), INSTALL),
        Program("mooncake", peer_python, peer, ("mooncake",), INSTALL),
        Program("baton gloo", own, "kv_baton_worker.py", ("gloo",)),
        Program("raw gloo", own, "kv_plain_worker.py", ("gloo",)),
        Program("baton grpc", own, "kv_baton_worker.py", ("grpc",)),
    ]


def measure(program: Program, logs: Path, divisor: int) -> tuple[str, dict[str, float]]:
    """One round of one engine: its version, and the seconds of each size. Raises WorkerFailed.

    The best time of a bulk size and the median of a latency.
    """
    with WorkerProcess(program, logs) as source, WorkerProcess(program, logs / "target") as target:
        target.ask("connect", peer=source.ask("listen"))
        seconds = {}
        for name, num_bytes in SIZES.items():
            fields = {"shape": SHAPES.get(name, "bulk"), "num_bytes": num_bytes}
            found = target.ask("measure", repeats=max(2, REPEATS[name] // divisor), **fields)
            seconds[name] = found["median_s" if name in LATENCIES else "best_s"]
        return source.version, seconds


def run(args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """Measures everything, in rounds in which each engine has a turn; progress goes to standard error."""
    load, started = ForeignLoad(), time.monotonic()
    candidates = [p for p in programs(args.peer_python) if not args.engines or p.engine in args.engines]
    states: dict[str, str] = {}
    rounds: dict[str, list[dict[str, float]]] = {}
    (logs / "target").mkdir()
    for turn in range(args.rounds):
        for program in candidates:
            if turn and program.engine not in rounds:
                continue
            try:
                states[program.engine], figures = measure(program, logs, 10 if args.quick else 1)
                rounds.setdefault(program.engine, []).append(figures)
            except WorkerFailed as error:
                states[program.engine] = str(error)
            print(f"[{time.monotonic() - started:4.0f} s] {program.engine}: {states[program.engine]}", file=sys.stderr)
    bests = {
        engine: {size: min(figures[size] for figures in turns) for size in SIZES} for engine, turns in rounds.items()
    }
    machine = machine_facts() | {"foreign_share": load.share(), "seconds": round(time.monotonic() - started)}
    return {"machine": machine, "num_rounds": args.rounds, "engines": states, "rounds": rounds, "figures": bests}


def report(results: dict[str, Any]) -> str:
    """Markdown."""
    machine, figures = results["machine"], results["figures"]
    lines = [
        f"{machine['date']}, {machine['cpu']}, {machine['num_cores']} cores. Rounds: {results['num_rounds']}; GB/s are bests, latencies the lowest median. "
        f"It took {machine['seconds']} s. Other programs took {machine['foreign_share']:.0%} of the cores.",
        *(f"- {engine}: {state}" for engine, state in results["engines"].items()),
        "",
        *_speeds(figures),
        "",
        *table(
            ["target", "reached", "wanted", "met"],
            (
                [v.name, number(v.value, 3), f"{'<=' if v.at_most else '>='} {v.bound:g}", _word(v.is_met)]
                for v in verdicts(figures)
            ),
        ),
    ]
    return "\n".join(lines)


def _speeds(figures: dict[str, dict[str, float]]) -> Iterator[str]:
    head = ["", *(f"{size}, GB/s" for size in BULK), *(f"p50 {size}, us" for size in LATENCIES), "256 MiB over memcpy"]
    rows = []
    for engine in figures:
        fast = [(speed(figures, engine, size) or 0.0) / 1e9 for size in BULK]
        slow = [figures[engine][size] * 1e6 for size in LATENCIES]
        rows.append(
            [engine, *(number(f, 2) for f in fast), *(number(s, 0) for s in slow),
             number(over(figures, engine, "256 MiB", "memcpy"), 2)]
        )  # fmt: skip
    yield from table(head, rows)


def _word(is_met: bool | None) -> str:
    return "not measured" if is_met is None else "yes" if is_met else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=[p.engine for p in programs("")], help="all by default")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has NIXL and Mooncake")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one round with a tenth of the repeats: shows that it works"
    )
    parser.add_argument("--json", type=Path, help="also writes all figures, round by round, to this file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.quick:
        args.rounds = 1
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as logs:
        results = run(args, Path(logs))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1))
    print(report(results))


if __name__ == "__main__":
    main()
