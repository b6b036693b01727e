"""Speed and memory of Baton's engine beside transformers and llama.cpp, on the same random weights, in one run.

python bench/engine.py --quick
python bench/engine.py --llama-python llama/bin/python --json results.json
BATON_ISA=avx2 python bench/engine.py --threads 1 2 --busy --long

Prints tables with absolute figures, ratios, the share of what the machine allows, and whether each target is met.
BATON_ISA is Baton's worker.instruction_set. Ends with status 1 when Baton's fp32 tokens differ from transformers' on one of
the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf_files
from engine_loads import measure_loads
from engine_report import report
from engine_runs import Plan, measure_model
from engine_tokens import compare_tokens, greedy_tokens
from machine_facts import ForeignLoad, machine_facts
from model_shapes import SHAPES, Shape
from random_checkpoints import random_checkpoint
from roofline import Machine, best, limit
from worker_process import Program, WorkerFailed, WorkerProcess
from workloads import LONG, LONG_POOL_TOKENS, LONG_STEPS, MAX_LEN, SHORT, SHORT_POOL_TOKENS

BATON_CACHE = "baton"
"""Where in the cache Baton keeps compiled kernels and packed weights."""
PEERS = ("transformers", "continuous", "llama")
INSTALL_TRANSFORMERS = 'pip install "transformers>=5.0"'


def programs(peers: list[str], llama_python: str, *baton_options: str) -> list[Program]:
    """Baton first, started with `baton_options`, then the peers asked for."""
    own = sys.executable
    known = {
        "transformers": Program("transformers", own, "transformers_worker.py", (), INSTALL_TRANSFORMERS),
        "continuous": Program("continuous", own, "transformers_worker.py", ("--continuous",), INSTALL_TRANSFORMERS),
        "llama": Program("llama", llama_python, "llama_worker.py", (), gguf_files.INSTALL),
    }
    baton = Program("baton", own, "baton_worker.py", baton_options, "pip install -e .")
    return [baton, *(known[peer] for peer in peers)]


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


def limits(shape: Shape, machine: Machine, decode_steps: int) -> dict[str, float]:
    """The roofline of each workload, tokens per second."""
    long_limits = {workload.name: limit(machine, shape, workload, LONG_STEPS) for workload in LONG}
    return long_limits | {workload.name: limit(machine, shape, workload, decode_steps) for workload in SHORT}


def run(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Measures everything; progress goes to standard error."""
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {what}", file=sys.stderr, flush=True)

    load = ForeignLoad()
    pool_tokens = LONG_POOL_TOKENS if args.long else SHORT_POOL_TOKENS
    baton_options = (
        f"--pool-tokens={pool_tokens}",
        f"--instruction-set={os.environ.get('BATON_ISA', '')}",
        f"--cache-folder={cache / BATON_CACHE}",
    )
    usable, states = installed(programs(args.peers, args.llama_python, *baton_options), cache)
    for engine, state in states.items():
        say(f"{engine}: {state}")
    plan = Plan(
        tuple(usable), args.threads[-1], args.repeats, args.decode_steps, args.long, args.busy, args.longest_s, say
    )
    models: dict[str, Any] = {}
    machines: dict[int, list[Machine]] = {num_threads: [] for num_threads in args.threads}
    for name in args.models:
        models[name] = _model(SHAPES[name], args, plan, cache, machines)
    reached = {num_threads: best(measured) for num_threads, measured in machines.items()}
    for name, model in models.items():
        for one in model["runs"]:
            one["limits"] = limits(SHAPES[name], reached[one["num_threads"]], args.decode_steps)
    machine = machine_facts() | {
        "reached": {str(num_threads): asdict(found) for num_threads, found in reached.items()},
        "foreign_share": load.share(),
        "seconds": round(time.monotonic() - started),
    }
    return {"machine": machine, "repeats": args.repeats, "engines": states, "models": models}


def _model(
    shape: Shape, args: argparse.Namespace, plan: Plan, cache: Path, machines: dict[int, list[Machine]]
) -> dict[str, Any]:
    """Tokens, then loads, then the rounds with each number of threads, whose machines are added to `machines`."""
    plan.say(f"checkpoint {shape.name}")
    folder = random_checkpoint(shape, cache, args.seed, MAX_LEN)
    failures: list[str] = []
    tokens = greedy_tokens(plan.programs, plan.num_threads, folder, plan.say, failures)
    sentences, is_right = compare_tokens(tokens)
    loads = {}
    if not args.quick:
        loads = measure_loads(plan.programs, plan.num_threads, folder, cache / BATON_CACHE, plan.say, failures)
    runs = []
    for num_threads in args.threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # also for threads that an engine starts by itself
        figures, measured = measure_model(shape, folder, replace(plan, num_threads=num_threads))
        machines[num_threads] += measured
        runs.append(figures)
    return {
        "total_params": shape.total_params,
        "active_params": shape.active_params,
        "weight_bytes": shape.weight_bytes,
        "loads": loads,
        "runs": runs,
        "tokens": sentences,
        "is_right": is_right,
        "failures": failures,
    }


def main() -> int:
    """Parses the options, measures, prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown")
    parser.add_argument("--decode-steps", type=int, default=32, help="steps of a decode measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="threads of each engine, one run for each")
    parser.add_argument("--long", action="store_true", help="also contexts of 8K and 32K and a prompt of 16K, once")
    parser.add_argument(
        "--longest-s", type=float, default=120.0, help="leaves out workloads whose prompts would take more"
    )
    parser.add_argument("--busy", action="store_true", help="also beside a process that keeps one core busy, once")
    parser.add_argument("--quick", action="store_true", help="one round of 8 decode steps: shows that it works")
    parser.add_argument("--cache", type=Path, help="keeps checkpoints and conversions here (14 GB for all models)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--json", type=Path, help="also writes all figures, round by round, to this file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads[-1])
    if args.repeats < 1 or args.decode_steps < 1 or min(args.threads) < 1:
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
