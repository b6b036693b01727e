"""Speed and memory of Baton's engine beside transformers and llama.cpp, on the same random weights, in one run.

python bench/engine.py --quick
python bench/engine.py --llama-python llama/bin/python --json results.json

Prints tables with absolute figures, ratios, the share of what the machine allows, and whether each target is met.
Ends with status 1 when Baton's fp32 tokens differ from transformers' on one of the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf_files
from engine_report import report
from engine_runs import Plan, limits, measure_model
from machine_facts import ForeignLoad, machine_facts
from model_shapes import SHAPES
from random_checkpoints import random_checkpoint
from roofline import Machine, best
from worker_process import Program, WorkerFailed, WorkerProcess

PEERS = ("transformers", "continuous", "llama")
INSTALL_TRANSFORMERS = 'pip install "transformers>=5.0"'


def programs(peers: list[str], llama_python: str) -> list[Program]:
    """Baton first, then the peers asked for."""
    own = sys.executable
    known = {
        "transformers": Program("transformers", own, "transformers_worker.py", (), INSTALL_TRANSFORMERS),
        "continuous": Program("continuous", own, "transformers_worker.py", ("--continuous",), INSTALL_TRANSFORMERS),
        "llama": Program("llama", llama_python, "llama_worker.py", (), gguf_files.INSTALL),
    }
    return [Program("baton", own, "baton_worker.py", (), "pip install -e ."), *(known[peer] for peer in peers)]


def installed(candidates: list[Program], logs: Path) -> tuple[list[Program], dict[str, str]]:
    """Those that start, and a word on each: its version, or why it is missing."""
    usable, states = [], {}
    for program in candidates:
        try:
            with WorkerProcess(program, logs) as worker:
                states[program.engine] = worker.version
            usable.append(program)
        except WorkerFailed as error:
            states[program.engine] = str(error)
    return usable, states


def run(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Measures everything; progress goes to standard error."""
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {what}", file=sys.stderr, flush=True)

    load = ForeignLoad()
    usable, states = installed(programs(args.peers, args.llama_python), cache)
    for engine, state in states.items():
        say(f"{engine}: {state}")
    plan = Plan(tuple(usable), args.threads, args.repeats, args.decode_steps, say)
    models: dict[str, Any] = {}
    machines: list[Machine] = []
    for name in args.models:
        say(f"checkpoint {name}")
        folder = random_checkpoint(SHAPES[name], cache, args.seed)
        models[name], measured = measure_model(SHAPES[name], folder, plan)
        machines += measured
    reached = best(machines)
    for name, model in models.items():
        model["limits"] = limits(SHAPES[name], reached, args.decode_steps)
    machine = machine_facts() | {
        "num_threads": args.threads,
        **asdict(reached),
        "foreign_share": load.share(),
        "seconds": round(time.monotonic() - started),
    }
    return {"machine": machine, "repeats": args.repeats, "engines": states, "models": models}


def main() -> int:
    """Parses the options, measures, prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown")
    parser.add_argument("--decode-steps", type=int, default=32, help="steps of a decode measurement")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine")
    parser.add_argument("--quick", action="store_true", help="one round of 8 decode steps: shows that it works")
    parser.add_argument("--cache", type=Path, help="keeps checkpoints and conversions here (14 GB for all models)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--json", type=Path, help="also writes all figures, round by round, to this file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # also for threads that an engine starts by itself
    if args.repeats < 1 or args.decode_steps < 1 or args.threads < 1:
        parser.error("--repeats, --decode-steps and --threads must be at least 1")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.repeats, args.decode_steps = 1, 8
    scratch = tempfile.TemporaryDirectory(prefix="baton-bench-") if args.cache is None else nullcontext(args.cache)
    with scratch as folder:
        cache = Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        results = run(args, cache)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(report(results))
    return 0 if all(model["is_right"] for model in results["models"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
