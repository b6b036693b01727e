"""Takes unlikely tokens out of a distribution: top-k, top-p (nucleus) and min-p, each as a threshold; knows no noise.

Tokens that tie with the last one kept are kept too. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.request import SamplingParams
from workers.sampling.arithmetic import logarithm_of, on_device, weights

_SIGN_BITS = 31
_SHORT = 1024
"""Tokens of a short nucleus."""


def min_p_offset(min_p: float) -> float:
    """What a logit may lie below the largest one, negative, rounded to fp32."""
    return logarithm_of(max(min_p, 1e-30))


def drop_unlikely(logits_RV: Tensor, params: Sequence[SamplingParams]) -> None:
    """Sets what the filters drop to -inf, in place, in the order top_k, top_p, min_p; logits are fp32, tempered."""
    top_k = [(row, p.top_k) for row, p in enumerate(params) if 0 < p.top_k < logits_RV.shape[1]]
    if top_k:
        rows, k_R1 = _columns(top_k, logits_RV.device, torch.int64)
        chosen_RV = logits_RV.index_select(0, rows)
        best = chosen_RV.topk(max(k for _, k in top_k), dim=-1).values
        _keep(logits_RV, rows, chosen_RV, chosen_RV >= best.gather(1, k_R1 - 1))
    top_p = [(row, p.top_p) for row, p in enumerate(params) if p.top_p < 1]
    if top_p:
        rows, p_R1 = _columns(top_p, logits_RV.device, torch.float64)
        chosen_RV = logits_RV.index_select(0, rows)
        weights_RV = weights(chosen_RV, chosen_RV.amax(-1, keepdim=True))
        _keep(logits_RV, rows, chosen_RV, weights_RV >= nucleus_threshold(weights_RV, p_R1))
    min_p = [(row, min_p_offset(p.min_p)) for row, p in enumerate(params) if p.min_p > 0]
    if min_p:
        rows, offset_R1 = _columns(min_p, logits_RV.device, torch.float32)
        chosen_RV = logits_RV.index_select(0, rows)
        _keep(logits_RV, rows, chosen_RV, chosen_RV >= chosen_RV.amax(-1, keepdim=True) + offset_R1)


def nucleus_threshold(weights_RV: Tensor, p_R1: Tensor) -> Tensor:
    """The least weight [R, 1] among the fewest heaviest tokens that have p of the sum (Holtzman et al. 2020).

    The sums are of integers, so nothing depends on their order. The threshold's bits are found one by one, from the highest
    on, so that the host need not look at a result of a device.
    """
    counts_RV = weights_RV.to(torch.int64)
    wanted_R1 = (counts_RV.sum(-1, keepdim=True).double() * p_R1).ceil().to(torch.int64)
    if (
        weights_RV.device.type == "cpu"
    ):  # the host may look there: a nucleus is mostly short, and found sooner by sorting
        best = weights_RV.topk(min(_SHORT, weights_RV.shape[1]), dim=-1).values
        sums = best.to(torch.int64).cumsum(-1)
        if bool((sums[:, -1:] >= wanted_R1).all()):
            return best.gather(1, (sums < wanted_R1).sum(-1, keepdim=True))
    bits_RV = weights_RV.view(torch.int32)  # of positive floats: in the order of their values
    threshold_R1 = torch.zeros_like(wanted_R1, dtype=torch.int32)
    for bit in reversed(range(_SIGN_BITS)):
        higher_R1 = threshold_R1 | (1 << bit)
        sums_R1 = torch.where(bits_RV >= higher_R1, counts_RV, 0).sum(-1, keepdim=True)
        threshold_R1 = torch.where(sums_R1 >= wanted_R1, higher_R1, threshold_R1)
    return threshold_R1.view(torch.float32)


def _columns(pairs: Sequence[tuple[int, float]], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row numbers [R] and values [R, 1]."""
    return on_device([row for row, _ in pairs], device), on_device([[value] for _, value in pairs], device, dtype)


def _keep(logits_RV: Tensor, rows: Tensor, chosen_RV: Tensor, is_kept_RV: Tensor) -> None:
    """Drops tokens of some rows, whose logits `chosen_RV` are."""
    logits_RV.index_copy_(0, rows, chosen_RV.masked_fill(~is_kept_RV, -torch.inf))
