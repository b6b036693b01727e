"""Reports log-probabilities of the unchanged logits, before temperature, penalties and filters.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.sampling.arithmetic import log_total, on_device, weights
from workers.token_logprobs import LOGPROB_FLOOR, PromptScores, TokenLogprob


def token_logprobs(
    logits_RV: Tensor, tokens: Sequence[int], alternatives: Sequence[int | Sequence[int]]
) -> list[TokenLogprob]:
    """For each row the logprob and rank of its token, and so many of the most likely ones or those that are named, best first, ties by
    token id.

    A logprob is logit - largest - ln(sum of the weights), in double, rounded to fp32.
    """
    logits_RV = logits_RV.float()
    base_R1 = _base(logits_RV)
    logprobs_R, ranks_R = _of_tokens(logits_RV, base_R1, tokens)
    logprobs, ranks = logprobs_R.tolist(), ranks_R.tolist()
    return [
        TokenLogprob(token, floored(logprob), _alternatives(logits_V, base_1, wanted), rank)
        for token, logprob, rank, logits_V, base_1, wanted in zip(
            tokens, logprobs, ranks, logits_RV, base_R1, alternatives, strict=True
        )
    ]


def score_tokens(logits_RV: Tensor, tokens: Sequence[int], num_top: int, first: int = 0) -> PromptScores:
    """As `token_logprobs`, with the same number of alternatives for every row and no loop over them; row 0 is prompt token `first`."""
    logits_RV = logits_RV.float()
    base_R1 = _base(logits_RV)
    logprobs_R, ranks_R = _of_tokens(logits_RV, base_R1, tokens)
    top_RK, values_RK = _tops(logits_RV, min(num_top, logits_RV.shape[1]))
    top_logprobs_RK = (values_RK.double() - base_R1).float()
    return PromptScores(
        first,
        np.asarray(tokens, dtype=np.int32),
        np.maximum(logprobs_R.numpy(force=True), LOGPROB_FLOOR),
        ranks_R.to(torch.int32).numpy(force=True),
        top_RK.to(torch.int32).numpy(force=True),
        np.maximum(top_logprobs_RK.numpy(force=True), LOGPROB_FLOOR),
    )


def _base(logits_RV: Tensor) -> Tensor:
    """What a logit is above its logprob, double [R, 1]."""
    largest_R1 = logits_RV.amax(-1, keepdim=True)
    totals_R1 = weights(logits_RV, largest_R1).to(torch.int64).sum(-1, keepdim=True)
    return largest_R1.double() + log_total(totals_R1)


def _of_tokens(logits_RV: Tensor, base_R1: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logprobs, not floored, and ranks [R]."""
    tokens_R1 = on_device(tokens, logits_RV.device)[:, None]
    drawn_R1 = logits_RV.gather(1, tokens_R1)
    return (drawn_R1.double() - base_R1).float().squeeze(1), _ranks(logits_RV, tokens_R1, drawn_R1)


def _tops(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits of the largest ones [R, count], of equals the lowest id first."""
    if count == 0:
        return logits_RV[:, :0].to(torch.int64), logits_RV[:, :0]
    values_RK, ids_RK = logits_RV.topk(count)
    # topk breaks ties as it likes: among those it took, sorting by id and then stably by value puts them right, ...
    ids_RK = ids_RK.sort(dim=1).values
    values_RK, order_RK = logits_RV.gather(1, ids_RK).sort(dim=1, descending=True, stable=True)
    ids_RK = ids_RK.gather(1, order_RK)
    # ... and a row with equals that it did not take is looked at by itself.
    is_cut_R = (logits_RV >= values_RK[:, -1:]).sum(1) > count
    for row in is_cut_R.nonzero().squeeze(1).tolist():
        tokens = (logits_RV[row] >= values_RK[row, -1]).nonzero().squeeze(1)
        values_V, order_V = logits_RV[row, tokens].sort(descending=True, stable=True)
        values_RK[row], ids_RK[row] = values_V[:count], tokens[order_V[:count]]
    return ids_RK, values_RK


def _ranks(logits_RV: Tensor, tokens_R1: Tensor, drawn_R1: Tensor) -> Tensor:
    """Places, from 1 on, in the order of `_alternatives`: tokens that are likelier, or as likely with a lower id, come first."""
    ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    comes_first_RV = (logits_RV > drawn_R1) | ((logits_RV == drawn_R1) & (ids_V < tokens_R1))
    return comes_first_RV.sum(-1) + 1


def _alternatives(logits_V: Tensor, base_1: Tensor, wanted: int | Sequence[int]) -> tuple[tuple[int, float], ...]:
    if not wanted:
        return ()
    if isinstance(wanted, int):
        count = min(wanted, logits_V.shape[0])
        # topk breaks ties as it likes: take all that reach the last place, then sort them stably by value
        threshold = logits_V.topk(count).values[-1]
        tokens = (logits_V >= threshold).nonzero().squeeze(1)
    else:
        count = len(wanted)
        tokens = on_device(sorted(wanted), logits_V.device)
    values, order = logits_V[tokens].sort(descending=True, stable=True)
    logprobs = (values[:count].double() - base_1).float().tolist()
    return tuple((token, floored(value)) for token, value in zip(tokens[order[:count]].tolist(), logprobs, strict=True))


def floored(value: float) -> float:
    return max(value, LOGPROB_FLOOR)
