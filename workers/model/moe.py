"""A mixture-of-experts layer: which experts a token takes, and what they add up to.

Shapes: T tokens, D hidden, E experts, k chosen per token, A = T*k assignments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.model.expert_dispatch import combine, dispatch
from workers.model.layers import FeedForward, Linear


class Router:
    """Chooses experts, all in fp32.

    A correction bias decides with the probabilities who is chosen, but never enters the weights: the load balancing
    without an auxiliary loss of Wang et al. 2024 (arXiv 2408.15664).
    """

    def __init__(self, weight_ED: Tensor, bias_E: Tensor, num_choices: int, norm_min: float) -> None:
        self.linear = Linear(weight_ED.float())
        self._bias_E = bias_E.float()
        self._num_choices = num_choices
        self._norm_min = norm_min

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights fp32 [T, k], which sum to one, and expert ids [T, k]."""
        scores_TE = torch.softmax(self.linear(x_TD.float()), dim=-1)
        experts_Tk = torch.topk(scores_TE + self._bias_E, self._num_choices, dim=-1).indices
        chosen_Tk = scores_TE.gather(-1, experts_Tk)
        return chosen_Tk / chosen_Tk.sum(-1, keepdim=True).clamp(min=self._norm_min), experts_Tk


class MixtureOfExperts:
    """y = sum over chosen experts of weight * expert(x), plus the ungated shared experts."""

    def __init__(self, router: Router, experts: Sequence[FeedForward], shared_experts: FeedForward | None) -> None:
        self._router = router
        self._experts = tuple(experts)
        self._shared_experts = shared_experts

    def __call__(self, x_TD: Tensor) -> Tensor:
        weights_Tk, experts_Tk = self._router(x_TD)
        sent = dispatch(x_TD, experts_Tk, len(self._experts))
        outputs = [
            expert(rows)
            for expert, rows in zip(self._experts, torch.split(sent.rows_AD, sent.counts_E), strict=True)
            if rows.shape[0]
        ]
        y_TD = combine(torch.cat(outputs), weights_Tk, sent.receipt)
        if self._shared_experts is not None:
            y_TD = y_TD + self._shared_experts(x_TD)
        return y_TD.to(x_TD.dtype)

    @property
    def linears(self) -> tuple[Linear, ...]:
        shared = () if self._shared_experts is None else self._shared_experts.linears
        return (self._router.linear, *(linear for expert in self._experts for linear in expert.linears), *shared)
