"""Changes one row of logits before it is drawn from: biases, bans and penalties; knows no other row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workers.runner import SampleSpec
from workers.sampling.placement import on_device


def is_adjusted(spec: SampleSpec) -> bool:
    """Whether `adjust` would do anything; a row without must not pay for its copy."""
    params = spec.params
    return bool(
        params.logit_bias
        or params.bad_words
        or spec.suppressed_token_ids
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def adjust(row_V: Tensor, spec: SampleSpec) -> None:
    """Changes fp32 logits [V] in place: logit_bias, bad words, suppressed tokens, then penalties."""
    params = spec.params
    for token, bias in params.logit_bias:
        row_V[token] += bias
    banned = [*_completed_bad_words(spec), *spec.suppressed_token_ids]
    if banned:
        row_V[on_device(banned, row_V.device)] = -torch.inf
    if params.repetition_penalty != 1:
        _penalize_repetition(row_V, spec)
    if (params.presence_penalty or params.frequency_penalty) and len(spec.output_token_ids):
        tokens, counts = np.unique(np.asarray(spec.output_token_ids), return_counts=True)
        penalties = params.frequency_penalty * counts + params.presence_penalty
        row_V[on_device(tokens, row_V.device)] -= on_device(penalties, row_V.device, torch.float32)


def _penalize_repetition(row_V: Tensor, spec: SampleSpec) -> None:
    """Tokens of prompt and output: positive logits are divided, negative ones multiplied (Keskar et al. 2019, CTRL)."""
    seen = on_device(np.unique([*spec.prompt_token_ids, *spec.output_token_ids]), row_V.device)
    logits, penalty = row_V[seen], spec.params.repetition_penalty
    row_V[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)


def _completed_bad_words(spec: SampleSpec) -> list[int]:
    """Last tokens of the bad words whose other tokens end the text so far, which may begin in the prompt."""
    longest = max((len(word) for word in spec.params.bad_words), default=1) - 1
    tail = tuple(spec.output_token_ids[-longest:]) if longest else ()
    if len(tail) < longest:
        tail = (*spec.prompt_token_ids[-(longest - len(tail)) :], *tail)
    return [word[-1] for word in spec.params.bad_words if len(word) == 1 or tail[-(len(word) - 1) :] == word[:-1]]
