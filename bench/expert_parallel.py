"""Measures groups of ranks on this machine: step time and bytes moved against the formula, recovery, balance; projects to GPUs."""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exchange_costs import MODELS, project, token_bytes
from model_shapes import SMALL
from random_checkpoints import random_checkpoint

TOKEN = "bench"
PARTS = ("steps", "memory", "balance", "killed", "hung", "projection")


def serve(config: Any, rank: int, address: tuple[str, int]) -> None:
    """A rank process."""
    from workers.group.follower import Follower

    Follower(config, rank, TOKEN).serve(*address)


class Ranks:
    """A group on this machine whose rank 0 is this process; lost ranks are started anew."""

    def __init__(self, folder: Path, native: bool, **parallel: Any) -> None:
        from workers.config import ParallelConfig, WorkerConfig
        from workers.group.runner import GroupRunner

        settings = ParallelConfig(**{"heartbeat_timeout_s": 20.0, **parallel})
        self.config = WorkerConfig(
            model=str(folder), dtype="bfloat16", max_model_len=1024, kv_memory_bytes=64 << 20, native=native,
            parallel=settings,
        )  # fmt: skip
        self.processes: dict[int, Any] = {}
        self.lost_at_s = 0.0
        self.reasons: list[str] = []
        self.lost = threading.Event()
        self.runner = GroupRunner.load(self.config, token=TOKEN, on_listening=self._listening, on_lost=self._on_lost)
        if not self.runner.wait_serving(180):
            raise SystemExit("the group did not form within 180 s")

    def start(self, rank: int) -> None:
        process = mp.get_context("spawn").Process(target=serve, args=(self.config, rank, self.address), daemon=True)
        process.start()
        self.processes[rank] = process

    def stop(self) -> None:
        self.runner.stop()
        for process in self.processes.values():
            process.join(20)

    def _listening(self, address: tuple[str, int]) -> None:
        self.address = address
        for rank in range(1, self.config.parallel.size):
            self.start(rank)

    def _on_lost(self, rank: int, reason: str) -> None:
        self.lost_at_s = time.monotonic()
        self.reasons.append(reason)
        self.lost.set()


class Load:
    """`batch` sequences spread over the pools of a runner, driven without an engine."""

    prompt = 128
    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, runner: Any, batch: int) -> None:
        from workers.request import SamplingParams
        from workers.runner import BLOCK_SIZE, Batch, SampleSpec, SequenceSlice

        self._runner, self._batch, self._make, self._slice = runner, batch, Batch, SequenceSlice
        pools = runner.num_pools
        blocks = runner.kv_memory.layout.num_blocks // pools
        per = -(-1024 // BLOCK_SIZE) // 4
        self._tables = [[(i % pools) * blocks + (i // pools) * per + at for at in range(per)] for i in range(batch)]
        self._spec = SampleSpec(SamplingParams(temperature=0), 0, 0, (), ())
        self._length = self.prompt

    def prefill(self) -> float:
        """Seconds for one prompt a pool in one step."""
        pieces = tuple(
            self._slice(i, [(7 * i + at * 13) % 16000 + 5 for at in range(self.prompt)], 0, self._tables[i])
            for i in range(min(self._batch, 4))
        )
        started = self.clock()
        self._runner.execute(self._make(prefill=pieces))
        return self.clock() - started

    def fill(self) -> None:
        for first in range(0, self._batch, 4):
            pieces = tuple(
                self._slice(i, [(7 * i + at * 13) % 16000 + 5 for at in range(self.prompt)], 0, self._tables[i])
                for i in range(first, min(first + 4, self._batch))
            )
            self._runner.execute(self._make(prefill=pieces))

    def decode(self) -> float:
        pieces = tuple(
            self._slice(i, [(31 * i + self._length * 17) % 16000 + 5], self._length, self._tables[i], self._spec)
            for i in range(self._batch)
        )
        self._length += 1
        started = self.clock()
        self._runner.execute(self._make(decode=pieces))
        return self.clock() - started


def measure(runner: Any, batch: int, steps: int) -> tuple[float, float]:
    """Median seconds of a decode step and of a prefill step of four prompts."""
    load = Load(runner, batch)
    load.fill()
    decode = [load.decode() for _ in range(steps + 3)][3:]
    return statistics.median(decode), statistics.median(load.prefill() for _ in range(5))


def sent(runner: Any) -> int:
    return sum(done.sent_bytes for done in runner.last_done.values())


def measure_group(folder: Path, native: bool, batch: int, steps: int, **parallel: Any) -> dict[str, Any]:
    ranks = Ranks(folder, native, **parallel)
    try:
        decode_s, prefill_s = measure(ranks.runner, batch, steps)
        load = Load(ranks.runner, batch)
        load.fill()
        before = sent(ranks.runner)
        for _ in range(steps):
            load.decode()
        shape, size = SMALL, ranks.config.parallel.size
        moved = (sent(ranks.runner) - before) / (steps * batch * shape.num_moe_layers)
        exact = ranks.config.parallel.exact_combine
        tensor = ranks.config.parallel.tensor_parallel
        formula = token_bytes(shape.hidden_size, shape.experts_per_token, size, exact) if tensor == 1 else None
        return {
            "layout": parallel, "decode_ms": decode_s * 1e3, "prefill_ms": prefill_s * 1e3,
            "bytes_token_layer": moved, "formula": formula,
        }  # fmt: skip
    finally:
        ranks.stop()


def measure_recovery(folder: Path, native: bool, kill: int, heartbeat_s: float) -> dict[str, Any]:
    """From the signal to the loss being known, to healthy ranks idle again, to serving, beside a rank's start."""
    from workers.errors import PoolsLost

    ranks = Ranks(folder, native, expert_parallel=4, heartbeat_timeout_s=heartbeat_s)
    try:
        load = Load(ranks.runner, 8)
        load.fill()
        struck = threading.Event()
        times: dict[str, float] = {}

        def strike() -> None:
            struck.wait()
            times["struck"] = time.monotonic()
            os.kill(ranks.processes[2].pid, kill)
            ranks.lost.wait(60)
            ranks.processes[2].kill()
            ranks.start(2)

        thread = threading.Thread(target=strike)
        thread.start()
        struck.set()
        while "released" not in times:
            try:
                load.decode()
            except PoolsLost:
                times["released"] = time.monotonic()
        thread.join()
        while not ranks.runner.wait_serving(1):
            pass
        served = time.monotonic()
        # the same again without a start: the group breaks and meets anew with every rank alive
        epoch = ranks.runner.leader.epoch
        broken = time.monotonic()
        ranks.runner.leader.own_broke(epoch, "bench")
        while ranks.runner.leader.epoch == epoch or not ranks.runner.leader.is_serving:
            ranks.runner.wait_serving(0.01)
        reform_s = time.monotonic() - broken
        return {
            "signal": signal.Signals(kill).name, "found_s": ranks.lost_at_s - times["struck"],
            "released_s": times["released"] - times["struck"], "serving_s": served - times["struck"],
            "reform_s": reform_s, "reason": ranks.reasons[0],
        }  # fmt: skip
    finally:
        ranks.stop()


def measure_balance(folder: Path, native: bool) -> dict[str, Any]:
    """Max over mean of the ranks' load before and after a rebalancing, on a skewed load measured by the ranks."""
    from workers.model.parallel.expert_placement import imbalance

    ranks = Ranks(folder, native, expert_parallel=4, redundant_experts=8)
    try:
        runner, shape = ranks.runner, SMALL
        load = Load(runner, 16)
        load.fill()
        measured = runner.measure_load()
        skewed = [
            [count / (1 + expert) for expert, count in enumerate(sorted(layer, reverse=True))] for layer in measured
        ]
        layers = range(shape.num_moe_layers)

        def worst(values: Any) -> float:
            return max(imbalance(runner.placement.layers[at], values[at], 4) for at in layers)

        before = worst(skewed)
        moved = runner.rebalance([[int(1000 * value) for value in layer] for layer in skewed])
        during = [load.decode() for _ in range(moved)]
        quiet = statistics.median(load.decode() for _ in range(20))
        return {
            "before": before, "after": worst(skewed), "layers": moved, "step_ms": quiet * 1e3,
            "moving_step_ms": statistics.median(during) * 1e3, "expert_bytes": runner.member.runner.experts.expert_bytes,
        }  # fmt: skip
    finally:
        ranks.stop()


def measure_memory(folder: Path, native: bool) -> dict[str, Any]:
    """Peak growth of RSS while a rank's share loads, over the share's bytes, each in a process of its own."""
    found = {}
    for size in (1, 2, 4):
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        process = context.Process(target=_load_share, args=(str(folder), native, size, queue))
        process.start()
        found[size] = queue.get()
        process.join()
    return found


def _load_share(folder: str, native: bool, size: int, queue: Any) -> None:
    import torch

    from workers.config import ParallelConfig, WorkerConfig
    from workers.model.checkpoint.ernie_config import ErnieConfig
    from workers.model.cpu.rank_runner import load_rank
    from workers.model.decoder.layers import Linear
    from workers.model.decoder.rank import initial_placement, share_bytes
    from workers.model.parallel.collectives import Links
    from workers.model.parallel.layout import Layout

    config = WorkerConfig(
        model=folder, dtype="bfloat16", max_model_len=64, kv_memory_bytes=1 << 20, native=native,
        parallel=ParallelConfig(expert_parallel=size),
    )  # fmt: skip
    dimensions = ErnieConfig.load(Path(folder))
    Linear(torch.zeros(64, 64, dtype=torch.bfloat16))(torch.zeros(8, 64, dtype=torch.bfloat16))  # libraries load now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    placement = initial_placement(config, dimensions)
    runner = load_rank(config, size - 1, Links(), placement)
    layout = Layout.of(config.parallel, dimensions, size - 1)
    share = share_bytes(dimensions, layout, placement, torch.bfloat16, copies_tied_head=not native)
    del runner
    queue.put((_status("VmHWM") - before, share))


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def print_projection() -> None:
    print(
        "\n| model | ranks | tokens a rank | exact: exchange us | share | partial sums: exchange us | share | experts us |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for model in MODELS:
        for size in (8, 16, 32):
            for batch in (16, 128):
                exact, partial = (project(model, size, 8, batch, kind) for kind in (True, False))
                print(
                    f"| {model.name} | {size} | {batch} | {exact.exchange_us:.1f} | {exact.share:.0%} | "
                    f"{partial.exchange_us:.1f} | {partial.share:.0%} | {exact.experts_us:.0f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("bench/results/cache"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prompt", type=int, default=Load.prompt, help="tokens of a prompt")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count what rank 0's thread computes, without its waits: for a busy machine",
    )
    parser.add_argument("--torch", action="store_true", help="with PyTorch's kernels instead of those in C++")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    Load.prompt = arguments.prompt
    if arguments.cpu_time:
        Load.clock = staticmethod(time.thread_time)
    import torch

    torch.set_num_threads(1)
    folder, native = random_checkpoint(SMALL, arguments.cache), not arguments.torch
    found: dict[str, Any] = {}
    for part in arguments.parts:
        match part:
            case "steps":
                found[part] = print_steps(measure_steps(folder, native, arguments.batch, arguments.steps))
            case "memory":
                found[part] = measure_memory(folder, native)
            case "balance":
                found[part] = measure_balance(folder, native)
            case "killed":
                found[part] = measure_recovery(folder, native, signal.SIGKILL, 20.0)
            case "hung":
                found[part] = measure_recovery(folder, native, signal.SIGSTOP, 4.0)
            case "projection":
                print_projection()
        if part in found and part != "steps":
            print(f"\n{part}: {found[part]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def measure_steps(folder: Path, native: bool, batch: int, steps: int) -> Iterator[dict[str, Any]]:
    layouts: tuple[dict[str, Any], ...] = (
        {"expert_parallel": 2}, {"expert_parallel": 4}, {"expert_parallel": 4, "exact_combine": False},
        {"expert_parallel": 2, "min_overlap_tokens": 1}, {"expert_parallel": 2, "tensor_parallel": 2},
    )  # fmt: skip
    yield measure_single(folder, native, batch, steps)
    for layout in layouts:
        yield measure_group(folder, native, batch, steps, **layout)


def print_steps(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each as soon as it is measured; returns them all."""
    found = []
    print("| layout | decode step ms | prefill step ms | bytes a token and layer | formula |")
    print("|---|--:|--:|--:|--:|")
    for row in rows:
        found.append(row)
        layout = ", ".join(f"{name} {value}" for name, value in row["layout"].items()) or "one rank"
        formula = "-" if row["formula"] is None else f"{row['formula']:.0f}"
        moved = row["bytes_token_layer"]
        print(f"| {layout} | {row['decode_ms']:.1f} | {row['prefill_ms']:.1f} | {moved:.0f} | {formula} |", flush=True)
    return found


def measure_single(folder: Path, native: bool, batch: int, steps: int) -> dict[str, Any]:
    from workers.config import WorkerConfig
    from workers.model.cpu.runner import TorchRunner

    runner = TorchRunner.load(
        WorkerConfig(model=str(folder), dtype="bfloat16", max_model_len=1024, kv_memory_bytes=64 << 20, native=native)
    )
    decode_s, prefill_s = measure(runner, batch, steps)
    return {
        "layout": {}, "decode_ms": decode_s * 1e3, "prefill_ms": prefill_s * 1e3, "bytes_token_layer": 0.0,
        "formula": 0.0,
    }  # fmt: skip


if __name__ == "__main__":
    main()
