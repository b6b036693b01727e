"""Brings each token's row to the experts that it chose, and their outputs back. Local: all experts live in this process.

Shapes: T tokens, k experts of a token, A = T*k assignments, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `combine` needs to bring expert outputs home: where each (token, choice) landed among the dispatched rows."""

    place_A: Tensor
    num_choices: int


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows sorted by expert; expert e owns the next `counts_E[e]` of them."""

    rows_AD: Tensor
    counts_E: list[int]
    receipt: Receipt


def dispatch(x_TD: Tensor, experts_Tk: Tensor, num_experts: int) -> Dispatched:
    """Sorts the rows of x by chosen expert, tokens in order within one."""
    num_choices = experts_Tk.shape[1]
    flat_A = experts_Tk.flatten()
    order_A = torch.argsort(flat_A, stable=True)
    counts_E = torch.bincount(flat_A, minlength=num_experts).tolist()
    return Dispatched(
        x_TD.index_select(0, order_A // num_choices), counts_E, Receipt(torch.argsort(order_A), num_choices)
    )


def combine(outputs_AD: Tensor, weights_Tk: Tensor, receipt: Receipt) -> Tensor:
    """Weighted sum of each token's expert outputs, fp32 [T, D].

    Adds in the order of the token's choices, never in the order experts finished, so it does not depend on the batch.
    """
    home_TkD = torch.unflatten(outputs_AD.index_select(0, receipt.place_A).float(), 0, (-1, receipt.num_choices))
    weighted_TkD = home_TkD * weights_Tk[..., None]
    total_TD = weighted_TkD[:, 0]
    for choice in range(1, receipt.num_choices):
        total_TD = total_TD + weighted_TkD[:, choice]
    return total_TD
