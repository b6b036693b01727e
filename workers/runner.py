"""The contract between the step loop and a model: which tokens to compute, what comes back. Knows no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from workers.kv_memory.memory import KvMemory
from workers.request import SamplingParams
from workers.token_logprobs import PromptScores, TokenLogprob

BLOCK_SIZE = 64
"""Tokens per KV block; equals the prefill tile so that a block's bits do not depend on chunking."""


Ids = npt.NDArray[np.int32]
TokenMask = npt.NDArray[np.int32]
"""Tokens of a vocabulary, 32 to a word: token t is in it when bit t % 32 of word t // 32 is set."""


@dataclass(frozen=True, slots=True, eq=False)
class LogitEdits:
    """For one draw: `biases` are added to the logits of `bias_ids`, those of `banned_ids` become -inf, then come the penalties;
    what is not in `allowed` becomes -inf in the end (None: all are in it).

    No token stands in `bias_ids` or in `seen_ids` twice. `seen_ids` are the tokens that a penalty reads: those of the output, and
    with a repetition penalty those of the prompt; `seen_counts` says how often each stands in the output. The arrays may change
    once the draw is done.
    """

    bias_ids: Ids
    biases: npt.NDArray[np.float32]
    banned_ids: Ids
    seen_ids: Ids
    seen_counts: Ids
    allowed: TokenMask | None = None


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
    """A decode slice whose token the step before is still drawing (LaunchingRunner); `token_ids` holds a 0."""


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


@runtime_checkable
class LaunchingRunner(Runner, Protocol):
    """A Runner whose steps run in the order of their launches. `execute(batch, hook)` is `finish(launch(batch, None, hook))`.

    A slice that `is_late` takes the token that the step `after` draws for its sequence: a step that was launched
    directly before this one and need not be finished yet. Steps are finished in the order of their launches, each once;
    one whose launch raised counts as never launched. What a handle is, the runner alone knows. `on_layer` is called, on
    whichever thread, before `finish` returns or raises, and not after a launch that has raised.
    """

    def launch(self, batch: Batch, after: Any = None, on_layer: LayerHook | None = None) -> Any: ...

    def finish(self, launched: Any) -> list[Sampled]: ...
