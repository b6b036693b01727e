"""Draws one token from each row of logits; stateless, and no row's token depends on the other rows.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from workers.request import SamplingParams
from workers.runner import LogitEdits, SampleSpec, TokenMask
from workers.sampling.arithmetic import on_device
from workers.sampling.edits import changes_logits, edits_of
from workers.sampling.filters import drop_unlikely
from workers.sampling.logprobs import score_tokens, token_logprobs
from workers.sampling.noise import gumbel_noise, noise_key
from workers.token_logprobs import PromptScores, TokenLogprob


class RowKernel(Protocol):
    """Rows are fp32 on the host. None stands for a row, or for rows among which is one, with a logit that is +inf or no number:
    PyTorch decides there."""

    def sample(self, logits_RV: Tensor, specs: Sequence[SampleSpec]) -> list[tuple[int, TokenLogprob | None] | None]:
        """The token of each row, and its logprobs where the spec asks for as few of the most likely ones as a kernel finds; where it asks
        for more, or for others, PyTorch finds them. No spec has a forced token."""

    def score_tokens(self, logits_RV: Tensor, tokens: Sequence[int], num_top: int, first: int) -> PromptScores | None:
        """As workers.sampling.logprobs.score_tokens."""


def adjust(row_V: Tensor, edits: LogitEdits, params: SamplingParams) -> None:
    """Changes fp32 logits [V] in place: logit_bias, bad words and suppressed tokens, then penalties. What is allowed is not looked at."""
    device = row_V.device
    if len(edits.bias_ids):
        row_V[on_device(edits.bias_ids, device)] += on_device(edits.biases, device)
    if len(edits.banned_ids):
        row_V[on_device(edits.banned_ids, device)] = -torch.inf
    if not len(edits.seen_ids):
        return
    seen = on_device(edits.seen_ids, device)
    logits = row_V[seen]
    if (
        params.repetition_penalty != 1
    ):  # Keskar et al. 2019, CTRL: positive logits are divided, negative ones multiplied
        penalty = on_device([params.repetition_penalty], device, torch.float32)
        logits = torch.where(logits > 0, logits / penalty, logits * penalty)
    if params.presence_penalty or params.frequency_penalty:
        penalties = params.frequency_penalty * edits.seen_counts + params.presence_penalty * (edits.seen_counts > 0)
        logits = logits - on_device(penalties, device, torch.float32)
    row_V[seen] = logits


def keep_allowed(logits_RV: Tensor, masks: Sequence[tuple[int, TokenMask]]) -> None:
    """Sets what the masks of some rows leave out to -inf, in place; one copy to the device for all of them."""
    rows = on_device([row for row, _ in masks], logits_RV.device)
    words_RW = on_device(np.stack([mask for _, mask in masks]), logits_RV.device)
    bits_32 = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    is_allowed_RV = ((words_RW[:, :, None] >> bits_32) & 1).flatten(1)[:, : logits_RV.shape[1]].bool()
    logits_RV.index_copy_(0, rows, logits_RV.index_select(0, rows).masked_fill_(~is_allowed_RV, -torch.inf))


GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them overflows."""
_GROUP_ELEMENTS = 1 << 19
_CUDA_GROUP_ELEMENTS = 1 << 23
"""Logits drawn from at once; bounds the temporaries of the noise."""


@dataclass(slots=True)
class Drawn:
    token_id: int
    logprob: TokenLogprob | None = None


def is_plain(spec: SampleSpec) -> bool:
    """Whether the most likely token is all that is asked for, so that no logits need be seen."""
    params = spec.params
    if params.temperature >= GREEDY_BELOW or params.logprobs is not None or spec.edits is not None:
        return False
    return not (spec.suppressed_token_ids or changes_logits(params))


def sample(logits_RV: Tensor, specs: Sequence[SampleSpec], kernel: RowKernel | None = None) -> list[Drawn]:
    """One token a row from fp32 logits, which are left as they are.

    The order is: logit_bias, bad words, suppressed tokens, penalties, what is allowed, temperature, top_k, top_p, min_p, Gumbel-max
    with the noise of (seed, choice index, position, token id). Temperature 0 takes the largest logit, of equals the
    lowest id. A seed of None counts as 0. Logprobs are those of the logits as given. `kernel`, for logits on the
    host, changes the time it takes and no bit of the result.
    """
    if kernel is not None:
        return _sample_with(kernel, logits_RV, specs)
    tokens: list[int] = draw(logits_RV, specs).tolist()  # the one point where the host waits for a device
    for row, spec in enumerate(specs):
        if spec.forced_token_id is not None:
            tokens[row] = spec.forced_token_id
    return with_logprobs(logits_RV, tokens, specs)


def _sample_with(kernel: RowKernel, logits_RV: Tensor, specs: Sequence[SampleSpec]) -> list[Drawn]:
    drawn = {row: Drawn(s.forced_token_id) for row, s in enumerate(specs) if s.forced_token_id is not None}
    rows = [row for row in range(len(specs)) if row not in drawn]
    chosen_RV = logits_RV[rows] if drawn else logits_RV
    for row, found in zip(rows, kernel.sample(chosen_RV, [specs[row] for row in rows]), strict=True):
        own_1V, own = logits_RV[row : row + 1], [specs[row]]
        if found is None:
            drawn[row] = sample(own_1V, own)[0]
        elif found[1] is None and specs[row].params.logprobs is not None:
            drawn[row] = with_logprobs(own_1V, [found[0]], own)[0]
        else:
            drawn[row] = Drawn(*found)
    return [drawn[row] for row in range(len(specs))]


def draw(logits_RV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """The tokens of `sample`, int64 [R], still on the device of the logits; those of forced rows mean nothing."""
    adjusted_RV = _adjusted(logits_RV, specs)
    random_rows = [
        row for row, s in enumerate(specs) if s.params.temperature >= GREEDY_BELOW and s.forced_token_id is None
    ]
    is_all_random = len(random_rows) == len(specs)
    tokens_R = adjusted_RV.new_zeros(len(specs), dtype=torch.int64) if is_all_random else adjusted_RV.argmax(-1)
    size = max(1, (_CUDA_GROUP_ELEMENTS if logits_RV.is_cuda else _GROUP_ELEMENTS) // logits_RV.shape[1])
    for first in range(0, len(random_rows), size):
        rows = random_rows[first : first + size]
        index = on_device(rows, logits_RV.device)
        drawn_R = _draw(adjusted_RV.index_select(0, index), [specs[row] for row in rows])
        tokens_R.index_copy_(0, index, drawn_R)
    return tokens_R


def _adjusted(logits_RV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """The logits themselves, or a copy with the rows changed that ask for it."""
    found = [(row, spec, edits_of(spec)) for row, spec in enumerate(specs) if spec.forced_token_id is None]
    changed = [(row, spec, edits) for row, spec, edits in found if edits is not None]
    if not changed:
        return logits_RV
    adjusted_RV = logits_RV.clone()
    for row, spec, edits in changed:
        adjust(adjusted_RV[row], edits, spec.params)
    masks = [(row, edits.allowed) for row, _, edits in changed if edits.allowed is not None]
    if masks:
        keep_allowed(adjusted_RV, masks)
    return adjusted_RV


def _draw(logits_RV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Tokens drawn at random, int64 [R]; may write to its logits."""
    logits_RV /= on_device([[spec.params.temperature] for spec in specs], logits_RV.device)
    drop_unlikely(logits_RV, [spec.params for spec in specs])
    keys = [noise_key(spec.params.seed or 0, spec.choice_index, spec.position) for spec in specs]
    return (logits_RV + gumbel_noise(keys, logits_RV.shape[1], logits_RV.device)).argmax(-1)


def scores_of(
    logits_RV: Tensor, tokens: Sequence[int], num_top: int, first: int, kernel: RowKernel | None = None
) -> PromptScores:
    """As workers.sampling.logprobs.score_tokens, with a kernel if there is one."""
    found = None if kernel is None else kernel.score_tokens(logits_RV, tokens, num_top, first)
    return score_tokens(logits_RV, tokens, num_top, first) if found is None else found


def with_logprobs(logits_RV: Tensor, tokens: Sequence[int], specs: Sequence[SampleSpec]) -> list[Drawn]:
    """Drawn tokens with the logprobs that their rows ask for."""
    wanted = {row: spec.params.alternatives for row, spec in enumerate(specs) if spec.forced_token_id is None}
    asked = {row: alternatives for row, alternatives in wanted.items() if alternatives is not None}
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
