"""A model that only takes time: a Runner whose steps cost what a profile says and whose tokens are a function of request and position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from cluster.sim.content import KvContent
from cluster.sim.product import (
    BLOCK_SIZE,
    Batch,
    KvLayout,
    KvMemory,
    LayerHook,
    ModelInfo,
    Request,
    Sampled,
    SequenceSlice,
)
from cluster.sim.profiles.profile import Counts, Profile, Seconds
from cluster.sim.tokens import VOCAB_SIZE, output_run

FINGERPRINT = "simulated"


class EngineClock:
    """An engine's own time: that of the simulation, and during a step ahead of it by what the step has taken so far."""

    __slots__ = ("_now", "ahead_s")

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self._now() + self.ahead_s


class BytelessMemory(KvMemory):
    """A KV pool without its bytes: what is in a block is known by what was said of it."""

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.content = KvContent(layout.num_blocks, layout.num_layers)

    @property
    def blocks_per_bite(self) -> int:
        """Nothing is copied between steps."""
        return self.layout.num_blocks

    def close(self) -> None:
        pass


class TimedRunner:
    """As workers.runner.Runner. `slowness` multiplies what a step takes."""

    num_pools = 1
    vocab_size = VOCAB_SIZE

    def __init__(self, profile: Profile, memory: BytelessMemory, clock: EngineClock) -> None:
        self.kv_memory: KvMemory = memory
        self._content = memory.content
        self.slowness = 1.0
        self.num_steps = 0
        self.busy_s = 0.0
        self._cost = profile.cost.step_s
        self._run_cost = profile.decode_run_s
        self._clock = clock

    def step_s(self, prefill_tokens: int, prefill_attended: int, num_decodes: int, decode_attended: int) -> float:
        """Seconds of one step here and now."""
        return self.slowness * self._cost(prefill_tokens, prefill_attended, num_decodes, decode_attended)

    def decode_run_s(self, num_decodes: int, attended: Counts) -> Seconds:
        """As of the profile, here and now."""
        seconds: Seconds = self.slowness * self._run_cost(num_decodes, attended)
        return seconds

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        """Takes its time on the engine's clock, also between the layers that a hook hears of."""
        num_tokens = attended = decode_attended = 0
        for piece in batch.prefill:
            length = len(piece.token_ids)
            num_tokens += length
            attended += length * piece.start + length * (length + 1) // 2
        for piece in batch.decode:
            decode_attended += piece.start + 1
        seconds = self.step_s(num_tokens, attended, len(batch.decode), decode_attended)
        self.num_steps += 1
        self.busy_s += seconds
        clock = self._clock
        if on_layer is not None:
            num_layers = self.kv_memory.layout.num_layers
            for layer in range(on_layer.every, num_layers, on_layer.every):
                clock.ahead_s = seconds * layer / num_layers
                on_layer.call(layer)
        clock.ahead_s = seconds
        prefilled, decoded = self._content.prefilled, self._content.decoded
        sampled = [_sampled(piece, prefilled(piece)) for piece in batch.prefill]
        sampled += [_sampled(piece, decoded(piece)) for piece in batch.decode]
        return sampled


def _sampled(piece: SequenceSlice, is_own: bool) -> Sampled:
    """`is_own` False: it looked at KV that is not its own, so another token comes."""
    spec = piece.sample
    if spec is None:
        return Sampled(piece.sequence_id, None)
    if spec.forced_token_id is not None:
        return Sampled(piece.sequence_id, spec.forced_token_id)
    (token_id,) = output_run(spec.params.seed or 0, spec.position, 1)
    return Sampled(piece.sequence_id, token_id if is_own else 0)


class SilentDetokenizer:
    """Tokens of a simulation mean nothing."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


_SILENT = SilentDetokenizer()


def make_detokenizer(request: Request) -> SilentDetokenizer:
    return _SILENT


def layout_of(profile: Profile, num_parts: int) -> KvLayout:
    """A pool of the profile's blocks, cut into `num_parts` layers: a block travels in at most so many pieces."""
    head_dim = max(1, -(-profile.kv_bytes_per_token // (2 * num_parts)))
    return KvLayout(profile.num_blocks, num_parts, 1, BLOCK_SIZE, head_dim, "uint8", 1)


def info_of(profile: Profile) -> ModelInfo:
    return ModelInfo(profile.model, FINGERPRINT, VOCAB_SIZE, profile.max_model_len, BLOCK_SIZE)


def ends_of_run(
    runner: TimedRunner, starts: Sequence[int], num_steps: int, begin_s: float, until_s: float
) -> list[float]:
    """When each of at most `num_steps` decode steps ends that begin at `begin_s`, of sequences with so many computed tokens; those
    that end after `until_s` are left out."""
    count, attended = len(starts), sum(starts) + len(starts)
    # No step is shorter than the one before it, so no more than these can end in time.
    num_steps = min(num_steps, 1 + int((until_s - begin_s) / runner.step_s(0, 0, count, attended)))
    seconds = runner.decode_run_s(count, attended + count * np.arange(num_steps))
    ends: list[float] = np.cumsum(np.concatenate([[begin_s], seconds]))[1:].tolist()
    return ends[: bisect_right(ends, until_s)]
