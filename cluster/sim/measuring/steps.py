"""Measures the steps of an engine in this process: prompts by chunk and context, decodes by batch and context, both together."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.sim.measuring.skipping import SkippingRunner
from cluster.sim.profiles.fitted import MeasuredStep
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.request import Request, SamplingParams
from workers.runner import BLOCK_SIZE
from workers.worker import LoadedModel, make_engine

MAX_KIND_S = 4.0
"""A kind of step is not repeated within a round when it has taken so long."""
_WARM_STEPS = 2
_STEPS = 3
"""Of a kind, one after another."""


@dataclass(frozen=True, slots=True)
class StepKind:
    """A step with `num_decodes` sequences of `decode_context` tokens and a chunk of a prompt after `prefill_context` tokens."""

    prefill_tokens: int = 0
    prefill_context: int = 0
    num_decodes: int = 0
    decode_context: int = 0

    def num_skips(self, budget: int) -> int:
        """Steps until all that shall decode does; those that begin early get so many tokens meanwhile."""
        return -(-self.num_decodes * max(1, self.decode_context) // budget) + self.num_decodes // 8

    def room_tokens(self, budget: int) -> int:
        grown = self.decode_context + self.num_skips(budget) + 2 * BLOCK_SIZE
        return self.prefill_context + self.prefill_tokens + self.num_decodes * grown


def step_kinds(config: WorkerConfig, max_model_len: int, num_blocks: int) -> list[StepKind]:
    """What a profile is fitted to, as far as it fits the pool and the settings."""
    budget, room = config.max_batch_tokens, num_blocks * BLOCK_SIZE * 7 // 8
    longest = max_model_len - 8 * BLOCK_SIZE
    deep = [context for context in (0, 2, 4, 8, 15) if context * budget + budget < longest]
    chunks = sorted({size for size in (16, 64, 128, 256, budget // 2, budget) if size <= budget})
    kinds = [StepKind(chunk, context * budget) for context in deep for chunk in chunks]
    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    contexts = sorted({min(context, longest) for context in (BLOCK_SIZE, 512, 2048, 8192)})
    kinds += [
        StepKind(num_decodes=batch, decode_context=context)
        for batch in batches
        for context in contexts
        if batch <= config.max_num_seqs
    ]
    kinds += [
        StepKind(chunk, 0, batch, 512)
        for batch in (4, 16)
        for chunk in (budget // 4, budget - batch)
        if batch < config.max_num_seqs and chunk > 0
    ]
    return [kind for kind in kinds if kind.room_tokens(budget) <= room]


class StepMeter:
    """One engine. What it holds between two kinds is nothing."""

    def __init__(self, config: WorkerConfig, model: LoadedModel, runner: SkippingRunner, seed: int = 0) -> None:
        self._engine: Engine = make_engine(config, model)
        self._runner = runner
        self._budget = config.max_batch_tokens
        self._vocab_size = model.info.vocab_size
        self._draw = random.Random(seed)
        self._next_id = 0

    @property
    def num_held_blocks(self) -> int:
        return self._engine.num_held_blocks

    def close(self) -> None:
        self._engine.close()

    def measure(self, kind: StepKind) -> MeasuredStep:
        """One kind of step, the median of a few that follow one another."""
        started = time.perf_counter()
        seconds: list[float] = []
        num_tokens = 2 * kind.num_skips(self._budget) + _STEPS + 64
        decodes = [self._add(kind.decode_context, num_tokens) for _ in range(kind.num_decodes)]
        try:
            self._skip_until(lambda: self._num_decoding() == kind.num_decodes)
            if not kind.prefill_tokens:
                for _ in range(_WARM_STEPS):
                    self._engine.step()
            while len(seconds) < _STEPS and (not seconds or time.perf_counter() - started < MAX_KIND_S):
                seconds.append(self._one(kind))
        finally:
            for sequence_id in decodes:
                self._engine.cancel(sequence_id)
            self._engine.take_early()
        attended = kind.prefill_tokens * kind.prefill_context + kind.prefill_tokens * (kind.prefill_tokens + 1) // 2
        grown = kind.num_skips(self._budget) // 2 + _WARM_STEPS + len(seconds) // 2
        decoded = kind.num_decodes * (kind.decode_context + grown)
        return MeasuredStep(kind.prefill_tokens, attended, kind.num_decodes, decoded, statistics.median(seconds))

    def _one(self, kind: StepKind) -> float:
        prompt = None
        if kind.prefill_tokens:
            prompt = self._add(kind.prefill_context + kind.prefill_tokens, 2)
            self._runner.is_skipping = True
            for _ in range(kind.prefill_context // self._budget):
                self._engine.step()
            self._runner.is_skipping = False
        started = time.perf_counter()
        self._engine.step()
        elapsed = time.perf_counter() - started
        if prompt is not None:
            self._engine.cancel(prompt)
        return elapsed

    def _add(self, num_tokens: int, max_tokens: int) -> int:
        self._next_id += 1
        prompt = tuple(self._draw.randrange(10, self._vocab_size) for _ in range(max(1, num_tokens)))
        params = SamplingParams(max_tokens=max_tokens, temperature=0, seed=0, ignore_eos=True)
        self._engine.add(self._next_id, Request(f"profile-{self._next_id}", prompt, params))
        return self._next_id

    def _num_decoding(self) -> int:
        load = self._engine.load()
        return load.num_running if not load.num_waiting and not load.waiting_prefill_tokens else -1

    def _skip_until(self, is_done: Callable[[], bool]) -> None:
        self._runner.is_skipping = True
        while self._engine.has_work and not is_done():
            self._engine.step()
        self._runner.is_skipping = False


def undisturbed(rounds: list[list[MeasuredStep]]) -> tuple[MeasuredStep, ...]:
    """Of each kind the lower quartile over all rounds: what other programs do to a step only makes it longer.

    Rounds lie apart in time, so that a bad moment does not fall on one kind alone.
    """
    kinds = []
    for same in zip(*rounds, strict=True):
        ordered = sorted(same, key=lambda step: step.seconds)
        kinds.append(ordered[(len(ordered) - 1) // 4])
    return tuple(kinds)
