"""Runners without a model, for tests and measurements: their tokens betray a wrong, missing or stale KV block."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from workers.kv_memory.memory import KvMemory
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled, SequenceSlice
from workers.sampling.constraint import tokens_in
from workers.token_logprobs import TokenLogprob


class FakeRunner:
    """A runner without a model: the next token is a hash of the tokens found in the KV blocks.

    A missing, stale or misplaced block therefore changes the tokens, so schedulers, transfers and recovery can be
    tested in microseconds. Each KV slot of 8 bytes holds position * 2^32 + token + 1.
    """

    def __init__(self, kv_memory: KvMemory, vocab_size: int = 1000) -> None:
        self._memory = kv_memory
        self._vocab_size = vocab_size
        self._slots = kv_memory.bytes.view(np.int64).reshape(kv_memory.layout.num_blocks, -1)
        self.num_steps = 0
        self.num_pools = 1

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def kv_memory(self) -> KvMemory:
        return self._memory

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        """Computes as the protocol says; a block table too short for its slice raises IndexError.

        All it writes lies at the beginning of a block: its other layers are filled as well as they ever will be.
        """
        self.num_steps += 1
        for piece in (*batch.prefill, *batch.decode):
            self._write(piece)
        if on_layer is not None:
            for layer in range(on_layer.every, self._memory.layout.num_layers, on_layer.every):
                on_layer.call(layer)
        return [self._draw(piece) for piece in (*batch.prefill, *batch.decode)]

    def _write(self, piece: SequenceSlice) -> None:
        for offset, token in enumerate(piece.token_ids):
            position = piece.start + offset
            block = piece.block_table[position // BLOCK_SIZE]
            self._slots[block, position % BLOCK_SIZE] = (position << 32) + token + 1

    def _draw(self, piece: SequenceSlice) -> Sampled:
        if piece.sample is None:
            return Sampled(piece.sequence_id, None)
        if piece.sample.forced_token_id is not None:
            return Sampled(piece.sequence_id, piece.sample.forced_token_id)
        end = piece.start + len(piece.token_ids)
        blocks = list(piece.block_table[: -(-end // BLOCK_SIZE)])
        seen = self._slots[blocks, :BLOCK_SIZE].reshape(-1)[:end]
        spec = piece.sample
        salt = f"{spec.params.seed}/{spec.choice_index}/{spec.position}" if spec.params.temperature else ""
        if spec.params.repetition_penalty != 1:
            salt += f"/{list(spec.output_token_ids)}"
        digest = hashlib.blake2b(seen.tobytes() + salt.encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        if spec.edits is None or spec.edits.allowed is None:
            token = number % (self._vocab_size - 10) + 10
        else:
            tokens = tokens_in(spec.edits.allowed)
            token = int(tokens[number % len(tokens)])
        logprob = None if spec.params.logprobs is None else TokenLogprob(token, -0.5)
        return Sampled(piece.sequence_id, token, logprob)


@dataclass(slots=True, eq=False)
class Postponed:
    """A step that LateFakeRunner has put off; `results` once it has run."""

    batch: Batch
    after: Postponed | None
    on_layer: LayerHook | None = None
    results: list[Sampled] = field(default_factory=list)


class LateFakeRunner(FakeRunner):
    """A FakeRunner as slow as a device can be: a launched step reads and writes no block before it is finished.

    Whoever gives the blocks of a running step to somebody else, or looks at its tokens too early, gets other tokens.
    """

    def launch(self, batch: Batch, after: Postponed | None = None, on_layer: LayerHook | None = None) -> Postponed:
        prefill, decode = (tuple(_as_it_is_now(piece) for piece in part) for part in (batch.prefill, batch.decode))
        return Postponed(Batch(prefill, decode), after, on_layer)

    def finish(self, launched: Postponed) -> list[Sampled]:
        before = launched.after.results if launched.after else []  # none where that step failed: any token will do then
        drawn = {sampled.sequence_id: sampled.token_id for sampled in before}
        launched.after = None  # or every step would keep all steps before it
        decode: list[SequenceSlice] = []
        for piece in launched.batch.decode:
            if piece.is_late:
                token = drawn[piece.sequence_id] if before else None
                piece = replace(piece, token_ids=(token or 0,))
            decode.append(piece)
        launched.results = super().execute(Batch(launched.batch.prefill, tuple(decode)), launched.on_layer)
        return launched.results

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        return self.finish(self.launch(batch, None, on_layer))


def _as_it_is_now(piece: SequenceSlice) -> SequenceSlice:
    """The slice as a device sees it: what is drawn, or grown, after the launch does not get there."""
    spec = piece.sample and replace(piece.sample, output_token_ids=tuple(piece.sample.output_token_ids))
    return replace(piece, sample=spec, block_table=tuple(piece.block_table))
