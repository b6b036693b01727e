"""The contract between the step loop and a model: which tokens to compute, what comes back. Knows no tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from workers.kv_memory.memory import KvMemory
from workers.prompt_scores import PromptScores
from workers.request import SamplingParams, TokenLogprob
from workers.sampling.edits import LogitEdits

BLOCK_SIZE = 64
"""Tokens per KV block; equals the prefill tile so that a block's bits do not depend on chunking."""


# The next three are made for every token of every sequence, and a frozen dataclass takes three times as long to make. Nobody
# changes one all the same.


@dataclass(slots=True)
class SampleSpec:
    """How to draw the next token of a sequence.

    `position` is the index of the token to draw among the output tokens; with the seed and `choice_index` it
    addresses the noise. The histories feed penalties, min_tokens and bad_words. With `forced_token_id` the token is
    given (a replay): it is returned as drawn, and logprobs are not needed.
    `suppressed_token_ids` may not be drawn now (EOS and stop ids before min_tokens). `edits` say what all these do to
    the logits, where the sequence keeps account of it; without, whoever draws works it out from the histories.
    """

    params: SamplingParams
    choice_index: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    suppressed_token_ids: tuple[int, ...] = ()
    forced_token_id: int | None = None
    edits: LogitEdits | None = None


@dataclass(slots=True)
class SequenceSlice:
    """The part of one sequence that one step computes.

    `token_ids` sit at absolute positions start .. start+len-1; the KV of positions < start is in the blocks of
    `block_table` already; the slice's own KV is written there. A decode slice has exactly one token and takes the
    decode attention path; a prefill slice takes the tile path. `sample` None: only KV is wanted (not the last chunk).
    `prompt_logprobs` k: also return logprobs of the prompt tokens that follow each position of the slice.
    """

    sequence_id: int
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int] | npt.NDArray[np.int32]
    sample: SampleSpec | None = None
    prompt_logprobs: int | None = None
    next_token_id: int | None = None
    """With prompt_logprobs: the prompt token after the slice's last one (None at the prompt's end)."""
    is_late: bool = False
    """A decode slice whose token the step before is still drawing (workers.launching); `token_ids` holds a 0."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: prefill slices (any length) and decode slices (one token each)."""

    prefill: tuple[SequenceSlice, ...] = ()
    decode: tuple[SequenceSlice, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.prefill) + len(self.decode)


@dataclass(slots=True)
class Sampled:
    """Result of one slice. `token_id` is None where the slice had no SampleSpec."""

    sequence_id: int
    token_id: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: PromptScores | None = None


@dataclass(frozen=True, slots=True)
class LayerHook:
    """Wants to hear of a step's progress: `call(n)` when the KV of all prefill slices is written in the first n layers, and
    those layers of `blocks` can be read through `kv_memory.block`.

    Called in order after every `every`-th layer but the last one, on one thread or another, and never once the step's results
    are there or it has failed. It must be quick and must not raise.
    """

    every: int
    call: Callable[[int], None]
    blocks: tuple[int, ...] = ()
    """Those that the step fills for another worker."""


class Runner(Protocol):
    """Computes batches. One thread calls it; a batch's results come in the order prefill + decode.

    Results for a slice must depend on that slice's sequence alone (batch-invariant), bit for bit.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def kv_memory(self) -> KvMemory: ...

    @property
    def num_pools(self) -> int:
        """KV pools that share the blocks of kv_memory evenly, the first has the lowest ids. A sequence keeps to one pool."""

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        """A runner of several ranks may ignore `on_layer`.

        Raises PoolsLost when this batch must run again, after what lived in the lost pools has been computed again.
        """
        ...


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
        token = int.from_bytes(digest, "little") % (self._vocab_size - 10) + 10
        logprob = None if spec.params.logprobs is None else TokenLogprob(token, -0.5)
        return Sampled(piece.sequence_id, token, logprob)
