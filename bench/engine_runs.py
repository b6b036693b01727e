"""Measures all engines over one model with one number of threads, taking turns: load, then rounds of every workload.

The engines of a model are all loaded at once and each is measured while the others wait, so that a slow minute of the
machine falls on all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from busy_core import busy_core
from engine_tokens import Say
from gguf_files import model_path
from model_shapes import Shape
from roofline import Machine, prefill_flops
from targets import OVERHEAD_AT
from worker_process import HERE, Program, WorkerFailed, WorkerProcess
from workloads import BESIDE_A_BUSY_CORE, LONG, LONG_STEPS, PREFILLS, SHORT, Workload


@dataclass(frozen=True)
class Plan:
    """How much is measured, and with what."""

    programs: tuple[Program, ...]
    num_threads: int
    repeats: int
    decode_steps: int
    is_long: bool
    """Also long contexts, once."""
    is_beside_busy: bool
    """Also some workloads beside a process that keeps one core busy, once."""
    longest_s: float
    """A workload of whose prompts an engine would compute for longer is left out."""
    say: Say


@dataclass
class Collected:
    """Raw values: {engine: {measure: one value a round}}."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    failures: list[str] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)

    def add(self, engine: str, measure: str, value: float) -> None:
        self.values[engine][measure].append(value)

    def median(self, engine: str, measure: str) -> float | None:
        values = self.values[engine].get(measure, [])
        return statistics.median(values) if values else None

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            engine: {measure: statistics.median(values) for measure, values in measures.items()}
            for engine, measures in self.values.items()
        }


def measure_machine(num_threads: int) -> Machine:
    """In a process of its own, as the engines. Raises CalledProcessError."""
    command = [sys.executable, str(HERE / "machine_worker.py"), str(num_threads)]
    return Machine(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def expected_s(shape: Shape, workload: Workload, known: Workload, tokens_per_s: float) -> float:
    """Seconds for the prompts of a workload, going by the speed at which another one was computed."""
    flops_per_s = prefill_flops(shape, known.context) / (known.context / tokens_per_s)
    return workload.batch * prefill_flops(shape, workload.context) / flops_per_s


def measure_model(shape: Shape, folder: Path, plan: Plan) -> tuple[dict[str, Any], list[Machine]]:
    """All figures of one model but its limits, as engine_report and --json show them; and the machine's, each round."""
    collected = Collected()
    descriptions: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[str, WorkerProcess] = {}
        for program in plan.programs:
            plan.say(f"loading {shape.name} in {program.engine}")
            try:
                worker = stack.enter_context(WorkerProcess(program, folder.parent))
                _load(worker, program, shape, folder, plan, collected)
                descriptions[program.engine] = worker.ask("describe")["text"]
                workers[program.engine] = worker
            except WorkerFailed as error:
                collected.failures.append(f"{program.engine} load: {error}")
        for turn in range(plan.repeats):
            collected.machines.append(measure_machine(plan.num_threads))
            for workload in SHORT:
                able = {e: w for e, w in workers.items() if _is_able(e, shape, workload, plan, collected)}
                _take_turns(able, workload, workload.name, turn, plan, collected)
        for engine, worker in workers.items():
            try:
                collected.add(engine, "peak_bytes", worker.ask("memory")["peak_bytes"])
            except WorkerFailed as error:
                collected.failures.append(f"{engine} memory: {error}")
        if plan.is_beside_busy:
            with busy_core():
                for workload in BESIDE_A_BUSY_CORE:
                    _take_turns(workers, workload, workload.busy_name, 0, plan, collected)
        if plan.is_long:
            for workload in LONG:
                able = {e: w for e, w in workers.items() if _is_able(e, shape, workload, plan, collected)}
                _take_turns(able, workload, workload.name, 0, plan, collected)
    results = {
        "num_threads": plan.num_threads,
        "figures": collected.medians(),
        "rounds": collected.values,
        "descriptions": descriptions,
        "failures": collected.failures,
        "machines": [asdict(machine) for machine in collected.machines],
    }
    return results, collected.machines


def _load(
    worker: WorkerProcess, program: Program, shape: Shape, folder: Path, plan: Plan, collected: Collected
) -> None:
    """Loads, and runs a little of everything once so that nothing is measured for the first time."""
    path = model_path(program, folder, "bfloat16")
    loaded = worker.ask("load", path=str(path), dtype="bfloat16", num_threads=plan.num_threads)
    collected.add(program.engine, "load_s", loaded["load_s"])
    collected.add(program.engine, "load growth", loaded["peak_growth_bytes"] / shape.weight_bytes)
    collected.add(program.engine, "private growth", loaded["private_growth_bytes"] / shape.weight_bytes)
    worker.ask("greedy", num_prompt=64, num_tokens=2, seed=0)
    worker.ask("decode", batch=2, num_prompt=16, num_steps=2, seed=0)


def _is_able(engine: str, shape: Shape, workload: Workload, plan: Plan, collected: Collected) -> bool:
    """Whether an engine is asked a workload; if not, the reason is among the failures, once."""
    is_filled = workload.kind == "decode" and engine != "continuous"
    if is_filled or workload in PREFILLS or (workload.kind == "prefill" and engine == "continuous"):
        return True
    if engine == "continuous" and workload in LONG:
        reason = "left out, its cache cannot be filled from outside"
    else:
        known = PREFILLS[0] if engine == "continuous" else PREFILLS[-1]
        tokens_per_s = collected.median("transformers" if engine == "continuous" else engine, known.name)
        seconds = expected_s(shape, workload, known, tokens_per_s) if tokens_per_s else 0.0
        if seconds <= plan.longest_s:
            return True
        reason = f"left out, its prompts would take {seconds:.0f} s at the speed of {known.name} (--longest-s)"
    text = f"{engine} {workload.name}: {reason}"
    if not any(failure.startswith(f"{engine} {workload.name}: left out") for failure in collected.failures):
        collected.failures.append(text)
    return False


def _take_turns(
    workers: Mapping[str, WorkerProcess], workload: Workload, measure: str, turn: int, plan: Plan, collected: Collected
) -> None:
    """One workload on every engine once; the prompts differ from round to round and not from engine to engine.

    Keys and values of a decode step's prompts are put into the cache where an engine allows that.
    """
    for engine, worker in workers.items():
        if workload.kind == "prefill" and engine == "continuous":  # its prompts run as the other transformers engine's
            continue
        fields: dict[str, Any] = {"num_prompt": workload.context, "seed": turn + 1}
        if workload.kind == "decode":
            num_steps = LONG_STEPS if workload in LONG else plan.decode_steps
            fields |= {"batch": workload.batch, "num_steps": num_steps, "is_filled": engine != "continuous"}
        try:
            reply = worker.ask(workload.kind, **fields)
        except WorkerFailed as error:
            collected.failures.append(f"{engine} {measure}, round {turn + 1}: {error}")
            continue
        plan.say(f"round {turn + 1}: {measure} {engine} {reply['tokens_per_s']:.1f} tokens/s")
        collected.add(engine, measure, reply["tokens_per_s"])
        if "overhead" in reply and measure == OVERHEAD_AT:
            collected.add(engine, "overhead", reply["overhead"])
