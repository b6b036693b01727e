"""Reports log-probabilities of the unchanged logits, before temperature, penalties and filters.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.request import LOGPROB_FLOOR, TokenLogprob
from workers.sampling.arithmetic import log_total, weights
from workers.sampling.placement import on_device


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """For each row the logprob and rank of its token, and the `num_top` most likely ones, best first, ties by token id.

    A logprob is logit - largest - ln(sum of the weights), in double, rounded to fp32.
    """
    logits_RV = logits_RV.float()
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    totals_R1 = weights(logits_RV, largest_R1).to(torch.int64).sum(-1, keepdim=True)
    base_R1 = largest_R1.double() + log_total(totals_R1)
    tokens_R1 = on_device(tokens, logits_RV.device)[:, None]
    drawn_R1 = logits_RV.gather(1, tokens_R1)
    ranks = _ranks(logits_RV, tokens_R1, drawn_R1).tolist()
    logprobs = (drawn_R1.double() - base_R1).float().squeeze(1).tolist()
    return [
        TokenLogprob(token, floored(logprob), _top(logits_V, base_1, count), rank)
        for token, logprob, rank, logits_V, base_1, count in zip(
            tokens, logprobs, ranks, logits_RV, base_R1, num_top, strict=True
        )
    ]


def _ranks(logits_RV: Tensor, tokens_R1: Tensor, drawn_R1: Tensor) -> Tensor:
    """Places, from 1 on, in the order of `_top`: tokens that are likelier, or as likely with a lower id, come first."""
    ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    comes_first_RV = (logits_RV > drawn_R1) | ((logits_RV == drawn_R1) & (ids_V < tokens_R1))
    return comes_first_RV.sum(-1) + 1


def _top(logits_V: Tensor, base_1: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    count = min(count, logits_V.shape[0])
    # topk breaks ties as it likes: take all that reach the last place, then sort them stably by value
    threshold = logits_V.topk(count).values[-1]
    tokens = (logits_V >= threshold).nonzero().squeeze(1)
    values, order = logits_V[tokens].sort(descending=True, stable=True)
    logprobs = (values[:count].double() - base_1).float().tolist()
    return tuple((token, floored(value)) for token, value in zip(tokens[order[:count]].tolist(), logprobs, strict=True))


def floored(value: float) -> float:
    return max(value, LOGPROB_FLOOR)
