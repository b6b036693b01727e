"""Reports log-probabilities of the unchanged logits, before temperature, penalties and filters.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.request import LOGPROB_FLOOR, TokenLogprob
from workers.sampling.placement import on_device


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """For each row the logprob and rank of its token, and the `num_top` most likely ones, best first, ties by token id."""
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    tokens_R1 = on_device(tokens, logits_RV.device)[:, None]
    drawn_R1 = logprobs_RV.gather(1, tokens_R1)
    ranks_R = _ranks(logprobs_RV, tokens_R1, drawn_R1).tolist()
    drawn_R = drawn_R1.squeeze(1).tolist()
    return [
        TokenLogprob(token, _floored(drawn), _top(row, count), rank)
        for token, drawn, rank, row, count in zip(tokens, drawn_R, ranks_R, logprobs_RV, num_top, strict=True)
    ]


def _ranks(logprobs_RV: Tensor, tokens_R1: Tensor, drawn_R1: Tensor) -> Tensor:
    """Places, from 1 on, in the order of `_top`: tokens that are likelier, or as likely with a lower id, come first."""
    ids_V = torch.arange(logprobs_RV.shape[1], device=logprobs_RV.device)
    comes_first_RV = (logprobs_RV > drawn_R1) | ((logprobs_RV == drawn_R1) & (ids_V < tokens_R1))
    return comes_first_RV.sum(-1) + 1


def _top(logprobs_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    count = min(count, logprobs_V.shape[0])
    # topk breaks ties as it likes: take all that reach the last place, then sort them stably by value
    threshold = logprobs_V.topk(count).values[-1]
    tokens = (logprobs_V >= threshold).nonzero().squeeze(1)
    values, order = logprobs_V[tokens].sort(descending=True, stable=True)
    found = zip(tokens[order[:count]].tolist(), values[:count].tolist(), strict=True)
    return tuple((token, _floored(value)) for token, value in found)


def _floored(value: float) -> float:
    return max(value, LOGPROB_FLOOR)
