"""A mixture-of-experts layer: which experts a token takes, and what they add up to.

Shapes: T tokens, D hidden, E experts, k chosen per token, A = T*k assignments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.collectives import Links, Stages, finish, gather
from workers.model.expert_dispatch import Exchange, Local
from workers.model.layers import FeedForward, Linear
from workers.model.parallel import SINGLE, Layout


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
    """y = sum over chosen experts of weight * expert(x), plus the ungated shared experts.

    `experts` are those of this rank's slots. Ranks that share sequences bring a part of the rows each; a rank that has
    no rows takes part all the same.
    """

    def __init__(
        self,
        router: Router,
        experts: Sequence[FeedForward],
        shared_experts: FeedForward | None,
        exchange: Exchange | None = None,
        layout: Layout = SINGLE,
        links: Links | None = None,
    ) -> None:
        self._router = router
        self.experts = list(experts)
        self._shared_experts = shared_experts
        self.exchange = exchange or Local(len(experts))
        self._layout, self._links = layout, links
        self.load_E: Tensor | None = None
        """Counts the tokens that chose each expert, where somebody asks for it."""

    def __call__(self, x_TD: Tensor) -> Tensor:
        return finish(self.stages(x_TD))

    def stages(self, x_TD: Tensor) -> Stages[Tensor]:
        first, last = self._layout.rows(len(x_TD))
        mine_TD = yield from self._compute(x_TD[first:last])
        if self._layout.tensor == 1 or self._links is None or not len(x_TD):
            return mine_TD
        step = -(-len(x_TD) // self._layout.tensor)
        parts_GTD = yield from gather(self._links, F.pad(mine_TD, (0, 0, 0, step - len(mine_TD))))
        return parts_GTD.flatten(0, 1)[: len(x_TD)]

    def _compute(self, x_TD: Tensor) -> Stages[Tensor]:
        weights_Tk, experts_Tk = self._router(x_TD)
        if self.load_E is not None:
            self.load_E += torch.bincount(experts_Tk.flatten(), minlength=len(self.load_E))
        receipt = yield from self.exchange.dispatch(x_TD, weights_Tk, experts_Tk)
        shared_TD = None if self._shared_experts is None else self._shared_experts(x_TD)  # while the rows travel
        sent = yield from self.exchange.arrive(receipt)
        outputs = [
            expert(rows)
            for expert, rows in zip(self.experts, torch.split(sent.rows_AD, sent.counts_E), strict=True)
            if rows.shape[0]
        ]
        outputs_AD = torch.cat(outputs) if outputs else sent.rows_AD
        y_TD = yield from self.exchange.combine(outputs_AD, weights_Tk, sent.receipt)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.to(x_TD.dtype)

    @property
    def linears(self) -> tuple[Linear, ...]:
        shared = () if self._shared_experts is None else self._shared_experts.linears
        return (self._router.linear, *(linear for expert in self.experts for linear in expert.linears), *shared)
