"""Has the C++ kernels draw tokens and find logprobs, as workers.sampling defines both; knows no model.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.errors import InvariantViolated
from workers.model.native.library import Library
from workers.runner import LogitEdits, SampleSpec
from workers.sampling.edits import edits_of
from workers.sampling.filters import min_p_offset
from workers.sampling.logprobs import floored
from workers.sampling.noise import noise_key
from workers.sampling.sampler import GREEDY_BELOW
from workers.token_logprobs import LOGPROB_FLOOR, PromptScores, TokenLogprob

_SPEC = struct.Struct("=qQffdqddfiqqqQQQQQQ")
"""`struct DrawSpec` of source/draw.h."""
_MAX_TOP = 20
"""Of the kernel, for each row."""
_DRAWN = np.dtype(
    [
        ("token", "i8"),
        ("rank", "i8"),
        ("logprob", "f4"),
        ("num_top", "i4"),
        ("ids", "i4", _MAX_TOP),
        ("logprobs", "f4", _MAX_TOP),
    ]
)
"""`struct Drawn` of source/draw.h."""
_NO_NUMBER, _OUTSIDE = -1, -2
_NO_EDITS = (0, 0, 0, 0, 0, 0, 0, 0, 0)


class NativeRowKernel:
    """Implements workers.sampling.sampler.RowKernel. Used by one thread at a time."""

    def __init__(self, library: Library, model: ctypes.c_void_p | None = None) -> None:
        """Rows are shared out among the threads of `model`, which the caller keeps; without one the caller's draws them all."""
        self._library = library
        self._model = model

    def sample(self, logits_RV: Tensor, specs: Sequence[SampleSpec]) -> list[tuple[int, TokenLogprob | None] | None]:
        edits = [edits_of(spec) for spec in specs]  # alive as long as their addresses are used
        drawn = self._run(logits_RV, b"".join(map(_packed, specs, edits)), len(specs))
        tokens: list[int] = drawn["token"].tolist()
        return [
            None if token == _NO_NUMBER else (token, None if _num_top(spec) is None else _logprob(drawn[row]))
            for row, (token, spec) in enumerate(zip(tokens, specs, strict=True))
        ]

    def score_tokens(self, logits_RV: Tensor, tokens: Sequence[int], num_top: int, first: int) -> PromptScores | None:
        if num_top > _MAX_TOP:
            return None
        packed = b"".join(
            _SPEC.pack(token, 0, 0.0, -np.inf, 1.0, 0, 0.0, 0.0, 1.0, num_top, *_NO_EDITS) for token in tokens
        )
        drawn = self._run(logits_RV, packed, len(tokens))
        if (drawn["token"] == _NO_NUMBER).any():
            return None
        count = min(num_top, logits_RV.shape[1])
        return PromptScores(
            first,
            drawn["token"].astype(np.int32),
            np.maximum(drawn["logprob"], LOGPROB_FLOOR),
            drawn["rank"].astype(np.int32),
            drawn["ids"][:, :count].copy(),
            np.maximum(drawn["logprobs"][:, :count], LOGPROB_FLOOR),
        )

    def _run(self, logits_RV: Tensor, packed: bytes, num_rows: int) -> np.typing.NDArray[np.void]:
        """Raises InvariantViolated when a token id is outside the vocabulary."""
        if logits_RV.shape[0] != num_rows or logits_RV.dtype is not torch.float32:
            raise InvariantViolated(f"{num_rows} rows are drawn from {logits_RV.dtype} logits of {logits_RV.shape[0]}")
        logits_RV = logits_RV.contiguous()
        drawn = np.empty(num_rows, dtype=_DRAWN)
        self._library.draw(self._model, logits_RV.data_ptr(), num_rows, logits_RV.shape[1], packed, drawn.ctypes.data)
        if (drawn["token"] == _OUTSIDE).any():
            raise InvariantViolated("a token id of a request is outside the vocabulary")
        return drawn


def _num_top(spec: SampleSpec) -> int | None:
    """How many of the most likely tokens the kernel is to find beside the drawn one; None: it is to find no logprobs."""
    wanted = spec.params.alternatives
    return wanted if isinstance(wanted, int) and wanted <= _MAX_TOP else None


def _packed(spec: SampleSpec, edits: LogitEdits | None) -> bytes:
    params = spec.params
    return _SPEC.pack(
        -1,
        noise_key(params.seed or 0, spec.choice_index, spec.position),
        0.0 if params.temperature < GREEDY_BELOW else params.temperature,
        min_p_offset(params.min_p) if params.min_p > 0 else -np.inf,
        params.top_p,
        params.top_k,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        -1 if (num_top := _num_top(spec)) is None else num_top,
        *(_NO_EDITS if edits is None else _addresses(edits)),
    )


def _addresses(edits: LogitEdits) -> tuple[int, ...]:
    return (
        len(edits.bias_ids),
        len(edits.banned_ids),
        len(edits.seen_ids),
        edits.bias_ids.ctypes.data,
        edits.biases.ctypes.data,
        edits.banned_ids.ctypes.data,
        edits.seen_ids.ctypes.data,
        edits.seen_counts.ctypes.data,
        0 if edits.allowed is None else edits.allowed.ctypes.data,
    )


def _logprob(drawn: np.void) -> TokenLogprob:
    count = int(drawn["num_top"])
    top = zip(drawn["ids"][:count].tolist(), map(floored, drawn["logprobs"][:count].tolist()), strict=True)
    return TokenLogprob(int(drawn["token"]), floored(float(drawn["logprob"])), tuple(top), int(drawn["rank"]))
