"""Measures what serving adds to steps: real workers decode for a stream, and hand over prompts, beside what their engine takes alone."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cluster.sim.measuring.worker_process import worker_process
from cluster.sim.profiles.fitted import FittedCost
from workers.config import WorkerConfig
from workers.errors import BatonError
from workers.request import Request, SamplingParams
from workers.runner import BLOCK_SIZE
from workers.status import WorkerAddress
from workers.wire.attach import Submit
from workers.wire.grpc_client import GrpcWorkerClient

BATCHES = (1, 2, 4, 8, 16, 32)
_NUM_TOKENS = 96
_REPEATS = 3
"""The shortest counts: what other programs do only makes it longer."""
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class ServedStep:
    """A decode step of `num_decodes` sequences: from one frame to the next as a router sees them, and in the engine alone."""

    num_decodes: int
    served_s: float
    engine_s: float


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """A prompt that another worker computed, to its first token; and what steps and messages alone would take."""

    num_tokens: int
    num_steps: int
    served_s: float
    expected_s: float


@dataclass(frozen=True, slots=True)
class ServedTimes:
    """Empty where it was not measured."""

    decodes: tuple[ServedStep, ...] = ()
    prompts: tuple[ServedPrompt, ...] = ()


def measure_serving(config: WorkerConfig, cost: FittedCost, message_s: float, vocab_size: int) -> ServedTimes:
    """With two worker processes; `message_s` is what a handoff's messages and the stream take beside steps.

    Raises BatonError when a process does not start or a request fails.
    """
    settings: dict[str, Any] = asdict(
        replace(config, prefix_cache=False, port=0, kv_disk_folder="", local_prefill_tokens=0)
    )
    with (
        worker_process({"settings": settings, "role": "prefill"}) as (prefill,),
        worker_process({"settings": settings, "role": "mixed"}) as (decode,),
    ):
        measuring = _measure(prefill, decode, config, cost, message_s, vocab_size)
        return asyncio.run(asyncio.wait_for(measuring, TIMEOUT_S))


def with_serving(cost: FittedCost, serving: ServedTimes) -> FittedCost:
    """The cost with what serving adds: lines over sequences, and over prompt tokens and steps; no part of them below zero."""
    parts = cost.parts
    if serving.decodes:
        base, slope = _line(
            [each.num_decodes for each in serving.decodes],
            [each.served_s - each.engine_s for each in serving.decodes],
        )
        parts = replace(parts, decode_step_s=parts.decode_step_s + base, decode_s=parts.decode_s + slope)
    if serving.prompts:
        # Divided by steps: what a step adds, and what its tokens add.
        base, slope = _line(
            [each.num_tokens / each.num_steps for each in serving.prompts],
            [(each.served_s - each.expected_s) / each.num_steps for each in serving.prompts],
        )
        parts = replace(
            parts, prefill_step_s=parts.prefill_step_s + base, prefill_token_s=parts.prefill_token_s + slope
        )
    return FittedCost(parts)


def _line(at: Sequence[float], added: Sequence[float]) -> tuple[float, float]:
    """Beginning and slope of a line through what was added, neither below zero."""
    some = [max(0.0, value) for value in added]
    if len(set(at)) < 2:
        return statistics.fmean(some), 0.0
    slope, base = (float(value) for value in np.polyfit(at, some, 1))
    if slope < 0:
        return statistics.fmean(some), 0.0
    if base < 0:
        return 0.0, sum(x * y for x, y in zip(at, some, strict=True)) / sum(x * x for x in at)
    return base, slope


async def _measure(
    prefill: WorkerAddress,
    decode: WorkerAddress,
    config: WorkerConfig,
    cost: FittedCost,
    message_s: float,
    vocab_size: int,
) -> ServedTimes:
    link = GrpcWorkerClient().attach(decode, "profile")
    draw = random.Random(0)

    def send(name: str, num_tokens: int, max_tokens: int, *workers: WorkerAddress) -> None:
        prompt = tuple(draw.randrange(10, vocab_size) for _ in range(num_tokens))
        params = SamplingParams(max_tokens=max_tokens, temperature=0, seed=0, ignore_eos=True)
        link.send(Submit(Request(name, prompt, params), decode.generation, workers))

    decodes, prompts = [], []
    try:
        frames = link.frames()
        for batch in (each for each in BATCHES if each <= config.max_num_seqs):
            gaps = []
            for turn in range(_REPEATS):
                names = {f"decode-{batch}-{turn}-{number}" for number in range(batch)}
                for name in names:
                    send(name, BLOCK_SIZE, _NUM_TOKENS)
                gaps.append(await _gap_s(frames, names))
            context = BLOCK_SIZE + _NUM_TOKENS // 2
            decodes.append(ServedStep(batch, min(gaps), cost.step_s(0, 0, batch, batch * context)))
        chunk = config.max_batch_tokens
        for length in sorted({max(1, chunk // 4), max(1, chunk // 2), chunk, 2 * chunk, 3 * chunk}):
            seconds = []
            for turn in range(_REPEATS + 2):
                name = f"prompt-{length}-{turn}"
                started = time.perf_counter()
                send(name, length, 2, prefill)
                await _first_s(frames, name)
                seconds.append(time.perf_counter() - started)
                await _gap_s(frames, {name})
            alone = sum(_chunk_s(cost, first, min(chunk, length - first)) for first in range(0, length, chunk))
            prompts.append(ServedPrompt(length, -(-length // chunk), min(seconds), alone + message_s))
    finally:
        await link.close()
    return ServedTimes(tuple(decodes), tuple(prompts))


def _chunk_s(cost: FittedCost, context: int, num_tokens: int) -> float:
    return cost.step_s(num_tokens, num_tokens * context + num_tokens * (num_tokens + 1) // 2, 0, 0)


async def _first_s(frames: Any, name: str) -> None:
    """Until the request has its first token."""
    async for frame in frames:
        for output in frame.outputs:
            if output.request_id == name:
                if output.refusal is not None:
                    raise BatonError(f"a request failed while serving was measured: {output.message}")
                return
    raise BatonError("the worker went away while serving was measured")


async def _gap_s(frames: Any, names: set[str]) -> float:
    """The mean time between frames in which every one of the requests got tokens, until all have ended."""
    running, first_s, last_s, num_tokens = set(names), 0.0, 0.0, 0
    async for frame in frames:
        outputs = [output for output in frame.outputs if output.request_id in running]
        if len(outputs) == len(names) and outputs:
            last_s = time.perf_counter()
            if not first_s:
                first_s = last_s
            else:
                num_tokens += len(outputs[0].token_ids)
        for output in outputs:
            if output.refusal is not None:
                raise BatonError(f"a request failed while serving was measured: {output.message}")
            if output.finish_reason is not None:
                running.discard(output.request_id)
        if not running:
            return (last_s - first_s) / max(1, num_tokens)
    raise BatonError("the worker went away while serving was measured")
