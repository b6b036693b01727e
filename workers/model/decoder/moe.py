"""A mixture-of-experts layer: which experts a token takes, and what they add up to.

Shapes: T tokens, D hidden, E experts, k chosen per token, A = T*k assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.decoder.layers import FeedForward, Linear
from workers.model.parallel.collectives import Links, Stages, finish, gather
from workers.model.parallel.expert_dispatch import AllToAll, Exchange, ExpertTable, Local
from workers.model.parallel.layout import SINGLE, Layout


class ExpertRouter:
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
        router: ExpertRouter,
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
        y_TD = yield from share_rows(x_TD, self._layout, self._links, self._compute)
        return y_TD

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
        y_TD = yield from self.exchange.combine(outputs_AD, weights_Tk, sent.receipt, shared_TD)
        return y_TD

    def use_table(self, table: ExpertTable) -> None:
        """Experts are where `table` says from now on."""
        assert isinstance(self.exchange, AllToAll)
        self.exchange.table = table

    def expert_bytes(self, slot: int) -> Tensor:
        """The weights in a slot, flat uint8: gate, up, down."""
        return torch.cat(
            [linear.weight().contiguous().view(-1).view(torch.uint8) for linear in self.experts[slot].linears]
        )

    def rearrange(self, sources: Sequence[int | Tensor]) -> None:
        """Fills every slot anew: from a slot as it was, or with weights as `expert_bytes` gives them."""
        template = self.experts[0]
        self.experts = [
            self.experts[source] if isinstance(source, int) else _from_bytes(source, template) for source in sources
        ]

    @property
    def linears(self) -> tuple[Linear, ...]:
        shared = () if self._shared_experts is None else self._shared_experts.linears
        return (self._router.linear, *(linear for expert in self.experts for linear in expert.linears), *shared)


def share_rows(
    x_TD: Tensor, layout: Layout, links: Links | None, compute: Callable[[Tensor], Stages[Tensor]]
) -> Stages[Tensor]:
    """`compute` of all rows, where each of the ranks that share them takes a part, and all get the whole."""
    first, last = layout.rows(len(x_TD))
    mine_TD = yield from compute(x_TD[first:last])
    if layout.tensor == 1 or links is None or not len(x_TD):
        return mine_TD
    step = -(-len(x_TD) // layout.tensor)
    parts_GTD = yield from gather(links, F.pad(mine_TD, (0, 0, 0, step - len(mine_TD))))
    return parts_GTD.flatten(0, 1)[: len(x_TD)]


def _from_bytes(blob: Tensor, template: FeedForward) -> FeedForward:
    gate_up, down = template.linears
    num_bytes = gate_up.num_outputs * gate_up.num_inputs * gate_up.dtype.itemsize
    gate_up_XD = blob[:num_bytes].clone().view(gate_up.dtype).view(gate_up.num_outputs, gate_up.num_inputs)
    down_DF = blob[num_bytes:].clone().view(down.dtype).view(down.num_outputs, down.num_inputs)
    gate_FD, up_FD = gate_up_XD.chunk(2)
    expert = FeedForward(gate_FD, up_FD, down_DF)
    if down.is_tiled:
        for linear in expert.linears:
            linear.use_tiles()
    return expert
