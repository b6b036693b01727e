"""Takes unlikely tokens out of a distribution: top-k, top-p (nucleus) and min-p, each as a threshold; knows no noise.

Tokens that tie with the last one kept are kept too. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.request import SamplingParams
from workers.sampling.placement import on_device
from workers.sampling.shortcuts import Shortcuts

_NUCLEUS_WIDTHS = (64, 1024, 8192)
"""Tokens sorted for top-p, in turn, until the nucleus is among them; at last all of them."""


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    """Whether `drop_unlikely` drops anything from a row with these parameters."""
    return 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0


def drop_unlikely(logits_RV: Tensor, params: Sequence[SamplingParams], shortcuts: Shortcuts | None = None) -> None:
    """Sets what the filters drop to -inf, in place, in the order top_k, top_p, min_p; logits are fp32, tempered."""
    top_k = [(row, p.top_k) for row, p in enumerate(params) if 0 < p.top_k < logits_RV.shape[1]]
    if top_k:
        _keep_top_k(logits_RV, [row for row, _ in top_k], [k for _, k in top_k], shortcuts)
    top_p = [(row, p.top_p) for row, p in enumerate(params) if p.top_p < 1]
    if top_p:
        _keep_nucleus(logits_RV, [row for row, _ in top_p], [p for _, p in top_p], shortcuts)
    min_p = [(row, p.min_p) for row, p in enumerate(params) if p.min_p > 0]
    if min_p:
        rows = on_device([row for row, _ in min_p], logits_RV.device)
        threshold = on_device([[p] for _, p in min_p], logits_RV.device).log()
        chosen_RV = logits_RV.index_select(0, rows)
        _keep(logits_RV, rows, chosen_RV, chosen_RV, chosen_RV.amax(-1, keepdim=True) + threshold, shortcuts)


def _keep_top_k(logits_RV: Tensor, rows: list[int], ks: list[int], shortcuts: Shortcuts | None) -> None:
    index, k_R = on_device(rows, logits_RV.device), on_device(ks, logits_RV.device)
    chosen_RV = logits_RV.index_select(0, index)
    best = chosen_RV.topk(max(ks), dim=-1).values
    _keep(logits_RV, index, chosen_RV, chosen_RV, best.gather(1, k_R[:, None] - 1), shortcuts)


def _keep_nucleus(logits_RV: Tensor, rows: list[int], ps: list[float], shortcuts: Shortcuts | None) -> None:
    """The fewest most likely tokens whose probabilities add up to p (Holtzman et al. 2020)."""
    index, p_R1 = on_device(rows, logits_RV.device), on_device(ps, logits_RV.device)[:, None]
    chosen_RV = logits_RV.index_select(0, index)
    probabilities_RV = torch.softmax(chosen_RV, dim=-1)
    if shortcuts is not None:
        threshold_R1 = _short_threshold(probabilities_RV, p_R1, shortcuts)
    else:
        threshold_R1 = (_threshold if p_R1.device.type == "cpu" else _full_threshold)(probabilities_RV, p_R1)
    _keep(logits_RV, index, chosen_RV, probabilities_RV, threshold_R1, shortcuts)


def _full_threshold(probabilities_RV: Tensor, p_R1: Tensor) -> Tensor:
    """The least probability in each row's nucleus, [R, 1], by sorting everything: the host need not look at results."""
    best = probabilities_RV.sort(dim=-1, descending=True).values
    last = (best.cumsum(-1) < p_R1).sum(-1, keepdim=True)
    return best.gather(1, last.clamp_(max=best.shape[1] - 1))


def _threshold(probabilities_RV: Tensor, p_R1: Tensor) -> Tensor:
    """The same by sorting ever more of the likeliest tokens, until each row's nucleus is among them."""
    num_tokens = probabilities_RV.shape[1]
    threshold_R1 = torch.zeros_like(p_R1)
    open_rows = torch.arange(len(p_R1))
    for width in (*(w for w in _NUCLEUS_WIDTHS if w < num_tokens), num_tokens):
        best = probabilities_RV.index_select(0, open_rows).topk(width, dim=-1).values
        last = (best.cumsum(-1) < p_R1.index_select(0, open_rows)).sum(-1, keepdim=True)
        is_found = last.squeeze(1) < width
        threshold_R1[open_rows[is_found]] = best.gather(1, last.clamp(max=width - 1))[is_found]
        open_rows = open_rows[~is_found]
        if not len(open_rows):
            break
    return threshold_R1


def _short_threshold(probabilities_RV: Tensor, p_R1: Tensor, shortcuts: Shortcuts) -> Tensor:
    """The same, row by row, by a shortcut where it finds it."""
    found = [shortcuts.nucleus_threshold(row_V, float(p)) for row_V, p in zip(probabilities_RV, p_R1, strict=True)]
    threshold_R1 = torch.tensor([[0.0 if value is None else value] for value in found])
    missing = [row for row, value in enumerate(found) if value is None]
    if missing:
        threshold_R1[missing] = _threshold(probabilities_RV[missing], p_R1[missing])
    return threshold_R1


def _keep(
    logits_RV: Tensor,
    rows: Tensor,
    chosen_RV: Tensor,
    keys_RV: Tensor,
    threshold_R1: Tensor,
    shortcuts: Shortcuts | None,
) -> None:
    """Drops tokens of some rows, whose logits `chosen_RV` are, where the key is not at least its row's threshold."""
    if shortcuts is None:
        logits_RV.index_copy_(0, rows, chosen_RV.masked_fill(~(keys_RV >= threshold_R1), -torch.inf))
        return
    for row, keys_V, threshold in zip(rows.tolist(), keys_RV, threshold_R1.squeeze(1).tolist(), strict=True):
        shortcuts.drop_below(logits_RV[row], keys_V, threshold)
