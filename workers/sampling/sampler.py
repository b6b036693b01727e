"""Draws one token from each row of logits; stateless, and no row's token depends on the other rows.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.request import TokenLogprob
from workers.runner import SampleSpec
from workers.sampling.adjustments import adjust, is_adjusted
from workers.sampling.filters import drop_unlikely, is_filtered
from workers.sampling.logprobs import token_logprobs
from workers.sampling.noise import gumbel_noise, gumbel_noise_of, noise_key
from workers.sampling.placement import on_device
from workers.sampling.shortcuts import Shortcuts

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them overflows."""
_GROUP_ELEMENTS = 1 << 19
_CUDA_GROUP_ELEMENTS = 1 << 23
"""Logits drawn from at once; bounds the temporaries of the noise."""


@dataclass(frozen=True, slots=True)
class Drawn:
    token_id: int
    logprob: TokenLogprob | None = None


def is_plain(spec: SampleSpec) -> bool:
    """Whether the most likely token is all that is asked for, so that no logits need be seen."""
    params = spec.params
    return params.temperature < _GREEDY_BELOW and params.logprobs is None and not is_adjusted(spec)


def sample(logits_RV: Tensor, specs: Sequence[SampleSpec], shortcuts: Shortcuts | None = None) -> list[Drawn]:
    """One token a row from fp32 logits, which are left as they are.

    The order is: logit_bias, bad words, suppressed tokens, penalties, temperature, top_k, top_p, min_p, Gumbel-max
    with the noise of (seed, choice index, position, token id). Temperature 0 takes the largest logit, of equals the
    lowest id. A seed of None counts as 0. Logprobs are those of the logits as given. `shortcuts`, for logits on the
    host, change the time it takes and no token.
    """
    tokens: list[int] = draw(logits_RV, specs, shortcuts).tolist()  # the one point where the host waits for a device
    for row, spec in enumerate(specs):
        if spec.forced_token_id is not None:
            tokens[row] = spec.forced_token_id
    return with_logprobs(logits_RV, tokens, specs)


def draw(logits_RV: Tensor, specs: Sequence[SampleSpec], shortcuts: Shortcuts | None = None) -> Tensor:
    """The tokens of `sample`, int64 [R], still on the device of the logits; those of forced rows mean nothing."""
    adjusted_RV = _adjusted(logits_RV, specs)
    random_rows = [
        row for row, s in enumerate(specs) if s.params.temperature >= _GREEDY_BELOW and s.forced_token_id is None
    ]
    is_all_random = len(random_rows) == len(specs)
    tokens_R = adjusted_RV.new_zeros(len(specs), dtype=torch.int64) if is_all_random else adjusted_RV.argmax(-1)
    size = max(1, (_CUDA_GROUP_ELEMENTS if logits_RV.is_cuda else _GROUP_ELEMENTS) // logits_RV.shape[1])
    for first in range(0, len(random_rows), size):
        rows = random_rows[first : first + size]
        index = on_device(rows, logits_RV.device)
        drawn_R = _draw(adjusted_RV.index_select(0, index), [specs[row] for row in rows], shortcuts)
        tokens_R.index_copy_(0, index, drawn_R)
    return tokens_R


def _adjusted(logits_RV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """The logits themselves, or a copy with the rows changed that ask for it."""
    rows = [row for row, spec in enumerate(specs) if is_adjusted(spec) and spec.forced_token_id is None]
    if not rows:
        return logits_RV
    adjusted_RV = logits_RV.clone()
    for row in rows:
        adjust(adjusted_RV[row], specs[row])
    return adjusted_RV


def _draw(logits_RV: Tensor, specs: Sequence[SampleSpec], shortcuts: Shortcuts | None = None) -> Tensor:
    """Tokens drawn at random, int64 [R]; may write to its logits."""
    logits_RV /= on_device([[spec.params.temperature] for spec in specs], logits_RV.device)
    drop_unlikely(logits_RV, [spec.params for spec in specs], shortcuts)
    keys = [noise_key(spec.params.seed or 0, spec.choice_index, spec.position) for spec in specs]
    if shortcuts is not None:
        return torch.tensor(
            [_best_candidate(row_V, key, shortcuts) for row_V, key in zip(logits_RV, keys, strict=True)]
        )
    is_host = logits_RV.device.type == "cpu"  # elsewhere a choice by content would wait for the device
    if not (is_host and all(is_filtered(spec.params, logits_RV.shape[1]) for spec in specs)):
        return (logits_RV + gumbel_noise(keys, logits_RV.shape[1], logits_RV.device)).argmax(-1)
    tokens = torch.zeros(len(specs), dtype=torch.int64)
    for row, (row_V, key) in enumerate(zip(logits_RV, keys, strict=True)):
        kept = (row_V > -torch.inf).nonzero().squeeze(1)  # few: only they need noise
        if len(kept):
            tokens[row] = kept[(row_V[kept] + gumbel_noise_of(key, kept)).argmax()]
    return tokens


def _best_candidate(logits_V: Tensor, key: int, shortcuts: Shortcuts) -> int:
    """The token with the largest sum of logit and noise, of equals the lowest: noise is computed where it can matter."""
    candidates = shortcuts.candidates(logits_V, key)
    if candidates is None:
        return int((logits_V + gumbel_noise([key], len(logits_V))[0]).argmax())
    return int(candidates[(logits_V[candidates] + gumbel_noise_of(key, candidates)).argmax()])


def with_logprobs(logits_RV: Tensor, tokens: Sequence[int], specs: Sequence[SampleSpec]) -> list[Drawn]:
    """Drawn tokens with the logprobs that their rows ask for."""
    counts = {row: spec.params.logprobs for row, spec in enumerate(specs) if spec.forced_token_id is None}
    asked = {row: count for row, count in counts.items() if count is not None}
    drawn = [Drawn(token) for token in tokens]
    if asked:
        rows = list(asked)
        found = token_logprobs(
            logits_RV.index_select(0, on_device(rows, logits_RV.device)),
            [tokens[row] for row in rows],
            list(asked.values()),
        )
        for row, logprob in zip(rows, found, strict=True):
            drawn[row] = Drawn(tokens[row], logprob)
    return drawn
