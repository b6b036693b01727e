"""Runs all engines over one model, taking turns: tokens first, then load, then rounds of every workload.

The engines of a model are all loaded at once and each is measured while the others wait, so that a slow minute of the
machine falls on all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_files import gguf_file
from model_shapes import Shape
from roofline import Machine, decode_limit, prefill_limit
from targets import BATCHES, PREFILLS
from worker_process import HERE, Program, WorkerFailed, WorkerProcess

DECODE_PROMPT = 128
TOKENS_PROMPT, TOKENS_COUNT, TOKENS_SEED = 40, 16, 11

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured, and with what."""

    programs: tuple[Program, ...]
    num_threads: int
    repeats: int
    decode_steps: int
    say: Say


@dataclass
class Collected:
    """Raw values: {engine: {measure: one value a round}}."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    failures: list[str] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)

    def add(self, engine: str, measure: str, value: float) -> None:
        self.values[engine][measure].append(value)

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            engine: {measure: statistics.median(values) for measure, values in measures.items()}
            for engine, measures in self.values.items()
        }


def measure_machine(num_threads: int) -> Machine:
    """In a process of its own, as the engines. Raises CalledProcessError."""
    command = [sys.executable, str(HERE / "machine_worker.py"), str(num_threads)]
    return Machine(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def model_path(program: Program, folder: Path, dtype: str) -> str:
    """What the engine loads: the checkpoint, or for llama.cpp its conversion. Raises WorkerFailed."""
    if program.engine != "llama":
        return str(folder)
    return str(gguf_file(folder, "bf16" if dtype == "bfloat16" else "f32", program.python))


def greedy_tokens(plan: Plan, folder: Path, failures: list[str]) -> dict[str, list[int]]:
    """What each engine answers to the same prompt in fp32 and in bf16, by "engine dtype"; one process at a time."""
    tokens: dict[str, list[int]] = {}
    for program in plan.programs:
        if program.engine == "continuous":  # `greedy` is the other transformers engine's
            continue
        for dtype in ("float32", "bfloat16"):
            plan.say(f"tokens of {program.engine} in {dtype}")
            try:
                path = model_path(program, folder, dtype)
                with WorkerProcess(program, folder.parent) as worker:
                    worker.ask("load", path=path, dtype=dtype, num_threads=plan.num_threads)
                    reply = worker.ask("greedy", num_prompt=TOKENS_PROMPT, num_tokens=TOKENS_COUNT, seed=TOKENS_SEED)
                tokens[f"{program.engine} {dtype}"] = reply["tokens"]
            except WorkerFailed as error:
                failures.append(f"{program.engine} {dtype} tokens: {error}")
    return tokens


def compare_tokens(tokens: Mapping[str, Sequence[int]]) -> tuple[list[str], bool]:
    """Sentences on how far each engine agrees with the reference, and whether Baton's fp32 agrees wholly.

    The reference is transformers' fp32; without it, there is nothing to compare and nothing is wrong.
    """
    reference = tokens.get("transformers float32")
    if reference is None:
        return ["greedy tokens were not compared: transformers is missing"], True
    sentences, is_right = [], True
    for name, own in tokens.items():
        if name == "transformers float32":
            continue
        same = next((i for i, (a, b) in enumerate(zip(own, reference, strict=False)) if a != b), len(reference))
        sentences.append(f"greedy tokens of {name}: the first {same} of {len(reference)} equal transformers float32")
        if name == "baton float32":
            is_right = same == len(reference)
    return sentences, is_right


def limits(shape: Shape, machine: Machine, decode_steps: int) -> dict[str, float]:
    """The roofline of each workload, tokens per second."""
    context = DECODE_PROMPT + decode_steps / 2
    found = {f"prefill {n}": prefill_limit(machine, shape, n) for n in PREFILLS}
    return found | {f"decode {b}": decode_limit(machine, shape, b, context) for b in BATCHES}


def measure_model(shape: Shape, folder: Path, plan: Plan) -> tuple[dict[str, Any], list[Machine]]:
    """All figures of one model but its limits, as engine_report and --json show them; and the machine's, each round."""
    collected = Collected()
    tokens = greedy_tokens(plan, folder, collected.failures)
    sentences, is_right = compare_tokens(tokens)
    with ExitStack() as stack:
        workers: dict[str, WorkerProcess] = {}
        for program in plan.programs:
            plan.say(f"loading {shape.name} in {program.engine}")
            try:
                worker = stack.enter_context(WorkerProcess(program, folder.parent))
                _load(worker, program, shape, folder, plan, collected)
                workers[program.engine] = worker
            except WorkerFailed as error:
                collected.failures.append(f"{program.engine} load: {error}")
        for turn in range(plan.repeats):
            collected.machines.append(measure_machine(plan.num_threads))
            _round(workers, turn, plan, collected)
        for engine, worker in workers.items():
            try:
                collected.add(engine, "peak_bytes", worker.ask("memory")["peak_bytes"])
            except WorkerFailed as error:
                collected.failures.append(f"{engine} memory: {error}")
    results = {
        "total_params": shape.total_params,
        "active_params": shape.active_params,
        "weight_bytes": shape.weight_bytes,
        "figures": collected.medians(),
        "rounds": collected.values,
        "tokens": sentences,
        "is_right": is_right,
        "failures": collected.failures,
    }
    return results, collected.machines


def _load(
    worker: WorkerProcess, program: Program, shape: Shape, folder: Path, plan: Plan, collected: Collected
) -> None:
    """Loads, and runs a little of everything once so that nothing is measured for the first time."""
    path = model_path(program, folder, "bfloat16")
    loaded = worker.ask("load", path=path, dtype="bfloat16", num_threads=plan.num_threads)
    collected.add(program.engine, "load_s", loaded["load_s"])
    collected.add(program.engine, "load growth", loaded["peak_growth_bytes"] / shape.weight_bytes)
    collected.add(program.engine, "private growth", loaded["private_growth_bytes"] / shape.weight_bytes)
    worker.ask("greedy", num_prompt=64, num_tokens=2, seed=0)
    worker.ask("decode", batch=2, num_prompt=16, num_steps=2, seed=0)


def _round(workers: Mapping[str, WorkerProcess], turn: int, plan: Plan, collected: Collected) -> None:
    """Every workload on every engine once; the prompts differ from round to round and not from engine to engine."""
    for num_tokens in PREFILLS:
        for engine, worker in workers.items():
            if engine == "continuous":  # its prompts run as the other transformers engine's do
                continue
            _take(engine, f"prefill {num_tokens}", worker, turn, plan, collected, num_prompt=num_tokens)
    for batch in BATCHES:
        for engine, worker in workers.items():
            fields = {"batch": batch, "num_prompt": DECODE_PROMPT, "num_steps": plan.decode_steps}
            _take(engine, f"decode {batch}", worker, turn, plan, collected, **fields)


def _take(
    engine: str, measure: str, worker: WorkerProcess, turn: int, plan: Plan, collected: Collected, **fields: int
) -> None:
    try:
        reply = worker.ask(measure.split()[0], seed=turn + 1, **fields)
    except WorkerFailed as error:
        collected.failures.append(f"{engine} {measure}, round {turn + 1}: {error}")
        return
    plan.say(f"round {turn + 1}: {measure} {engine} {reply['tokens_per_s']:.1f} tokens/s")
    collected.add(engine, measure, reply["tokens_per_s"])
    if "overhead" in reply and measure == f"decode {BATCHES[-1]}":
        collected.add(engine, "overhead", reply["overhead"])
