"""Puts a measured profile together: steps, their fit, overheads, and where it was measured."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cluster.sim.measuring.busy import busy_neighbours
from cluster.sim.measuring.overheads import HANDOFF_HOPS, Overheads, measure_overheads
from cluster.sim.measuring.ranks import loaded
from cluster.sim.measuring.serving import ServedTimes, measure_serving, with_serving
from cluster.sim.measuring.steps import StepMeter, step_kinds, undisturbed
from cluster.sim.profiles.files import FORMAT
from cluster.sim.profiles.fitted import Fit, FittedCost, MeasuredStep, fit
from workers.config import WorkerConfig
from workers.kv_memory.memory import KvLayout
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.status import ModelInfo


@dataclass(frozen=True, slots=True)
class MeasuredWorker:
    """Everything that was measured of one worker."""

    config: WorkerConfig
    info: ModelInfo
    layout: KvLayout
    steps: tuple[MeasuredStep, ...]
    fit: Fit
    serving: ServedTimes
    overheads: Overheads
    num_beside: int
    seconds: float

    @property
    def cost(self) -> FittedCost:
        """Of a step in a worker that serves."""
        return with_serving(self.fit.cost, self.serving)

    def document(self, name: str) -> dict[str, Any]:
        """What `baton profile` writes and cluster.sim.profiles.files reads."""
        config, over = self.config, self.overheads
        return {
            "format": FORMAT,
            "kind": "fitted",
            "name": name,
            "model": self.info.name,
            "parts": asdict(self.cost.parts),
            "kv_bytes_per_token": self.layout.block_bytes // self.layout.block_size,
            "block_size": self.layout.block_size,
            "num_blocks": self.layout.num_blocks,
            "max_batched_tokens": config.max_batch_tokens,
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": min(self.info.max_model_len, self.layout.num_blocks * self.layout.block_size),
            "transfer_latency_s": over.transfer_latency_s,
            "transfer_bytes_per_s": max(1, int(over.transfer_bytes_per_s)),
            "router_s": over.router_s,
            "router_token_s": over.router_token_s,
            "connect_s": over.connect_s,
            "control_latency_s": over.control_latency_s,
            "evidence": {
                "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "machine": f"{_cpu_name()}, {os.cpu_count()} cores",
                "load_average": [round(value, 2) for value in os.getloadavg()],
                "device": config.device,
                "dtype": config.dtype,
                "num_threads": config.num_threads,
                "parallel": asdict(config.parallel),
                "processes_beside": self.num_beside,
                "seconds": round(self.seconds, 1),
                "typical_error": round(self.fit.typical_error, 4),
                "large_error": round(self.fit.large_error, 4),
                "worst_step": asdict(self.fit.worst),
                "steps": [asdict(step) for step in self.steps],
                "serving": asdict(self.serving),
                "transport": over.transport,
                "overheads": [
                    {"prompt_tokens": length, "here_s": here, "handed_over_s": away}
                    for length, here, away in over.samples
                ],
            },
        }


def measure(
    config: WorkerConfig, num_rounds: int, num_beside: int, is_served: bool, say: Callable[[str], None]
) -> MeasuredWorker:
    """Raises InvalidConfig, PoorFit or another BatonError in one sentence."""
    started = time.monotonic()
    moe = ErnieConfig.load(Path(config.model)).moe
    with ExitStack() as stack:
        say("loading the model")
        checkpoint, runner = stack.enter_context(loaded(config))
        layout, info = runner.kv_memory.layout, checkpoint.info
        meter = StepMeter(config, checkpoint, runner)
        stack.callback(meter.close)
        if num_beside:
            say(f"starting {num_beside} processes that compute beside")
            stack.enter_context(busy_neighbours(config, num_beside))
        say("measuring steps")
        kinds = step_kinds(config, info.max_model_len, layout.num_blocks // runner.num_pools)
        with tqdm(
            total=num_rounds * len(kinds), unit="kind", disable=not sys.stderr.isatty(), dynamic_ncols=True
        ) as bar:
            rounds: list[list[MeasuredStep]] = []
            for _ in range(num_rounds):
                rounds.append([])
                for kind in kinds:
                    rounds[-1].append(meter.measure(kind))
                    bar.update()
        steps = undisturbed(rounds)
        say("fitting")
        fitted = fit(steps, 0.0 if moe is None else moe.num_experts_per_token / moe.num_experts)
        overheads = measure_overheads(config.model, layout, info.max_model_len, info.vocab_size, 15, say)
        serving = ServedTimes()
        if is_served and config.parallel.size == 1:
            say("measuring what serving adds to steps")
            message_s = HANDOFF_HOPS * overheads.control_latency_s + 2 * overheads.router_s
            serving = measure_serving(config, fitted.cost, message_s, info.vocab_size)
    return MeasuredWorker(
        config, info, layout, steps, fitted, serving, overheads, num_beside, time.monotonic() - started
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
