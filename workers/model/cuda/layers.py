"""Weights on the device and what multiplies them: fixed tiles where bits must not depend on the batch, else the vendor's kernels.

Shapes: T rows, D hidden, F feed-forward width, E experts, k chosen for a row, A = T*k assignments, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.cuda.kernels.experts import choose_experts, combine
from workers.model.cuda.kernels.matmul import grouped_matmul, matmul, tile_for
from workers.model.cuda.kernels.rows import swiglu

_GROUPED_ALIGNMENT = 8
"""F.grouped_mm wants rows of 16 bytes' multiples: eight bf16 values."""
_GROUPED_CAPABILITIES = (9, 10)
"""Elsewhere F.grouped_mm loops over the groups on the host, which neither a graph nor a busy device can bear."""


class Linear:
    """y = x W^T without bias, W [O, I]."""

    def __init__(self, weight_OI: Tensor, deterministic: bool) -> None:
        self._weight_OI = weight_OI
        self._deterministic = deterministic

    def __call__(self, x_TI: Tensor, is_decode: bool) -> Tensor:
        if self._deterministic:
            return matmul(x_TI, self._weight_OI, tile_for(is_decode, x_TI.dtype))
        return F.linear(x_TI, self._weight_OI)


class FeedForward:
    """SwiGLU: down(silu(gate(x)) * up(x)); `gate_up_XD` holds gate above up, [2F, D]."""

    def __init__(self, gate_up_XD: Tensor, down_DF: Tensor, deterministic: bool) -> None:
        self._gate_up, self._down = Linear(gate_up_XD, deterministic), Linear(down_DF, deterministic)

    def __call__(self, x_TD: Tensor, is_decode: bool) -> Tensor:
        return self._down(swiglu(self._gate_up(x_TD, is_decode)), is_decode)


class Experts:
    """All experts of a layer, weights [E, 2F, D] and [E, D, F], on rows sorted by expert. Nothing waits for the device."""

    def __init__(self, gate_up_EXD: Tensor, down_EDF: Tensor, deterministic: bool) -> None:
        self._gate_up, self._down = gate_up_EXD, down_EDF
        self._expert_ids = torch.arange(gate_up_EXD.shape[0], dtype=torch.int32, device=gate_up_EXD.device)
        self._vendor = not deterministic and _can_group(gate_up_EXD) and _can_group(down_EDF)

    def __call__(self, x_TD: Tensor, experts_Tk: Tensor, is_decode: bool) -> tuple[Tensor, Tensor]:
        """Outputs [A, D] by expert, and where the output of each (row, choice) stands among them, [A]."""
        chosen_A, order_A = torch.sort(experts_Tk.flatten(), stable=True)
        ends_E = torch.searchsorted(chosen_A, self._expert_ids, right=True, out_int32=True)
        places_A = torch.empty_like(order_A)
        places_A.scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
        rows_AD = x_TD.index_select(0, order_A // experts_Tk.shape[1])
        return self.run(rows_AD, ends_E, is_decode), places_A

    def run(self, rows_AD: Tensor, ends_E: Tensor, is_decode: bool) -> Tensor:
        """Outputs [A, D] of rows sorted by expert: expert e has those before ends[e], int32, that none before it has."""
        if not rows_AD.shape[0]:
            return rows_AD
        hidden_AF = swiglu(self._multiply(rows_AD, self._gate_up, ends_E, is_decode))
        return self._multiply(hidden_AF, self._down, ends_E, is_decode)

    def bytes_of(self, expert: int) -> Tensor:
        """One expert's weights, flat uint8: gate, up, down."""
        return torch.cat([weight[expert].view(-1).view(torch.uint8) for weight in (self._gate_up, self._down)])

    def rearrange(self, sources: Sequence[int | Tensor]) -> None:
        """Fills every place anew, in the memory that is there: from a place as it was, or with weights as `bytes_of` gives."""
        fresh = {
            at: self.bytes_of(source) if isinstance(source, int) else source.to(self._down.device)
            for at, source in enumerate(sources)
            if not isinstance(source, int) or source != at
        }
        cut = self._gate_up[0].numel() * self._gate_up.element_size()
        with torch.inference_mode():
            for at, blob in fresh.items():
                self._gate_up[at].view(-1).view(torch.uint8).copy_(blob[:cut])
                self._down[at].view(-1).view(torch.uint8).copy_(blob[cut:])

    def _multiply(self, x_AI: Tensor, weight_EOI: Tensor, ends_E: Tensor, is_decode: bool) -> Tensor:
        if self._vendor:
            return F.grouped_mm(x_AI, weight_EOI.mT, offs=ends_E)
        return grouped_matmul(x_AI, weight_EOI, ends_E, tile_for(is_decode, x_AI.dtype))


def _can_group(weight_EOI: Tensor) -> bool:
    """Whether F.grouped_mm takes this weight and computes without asking the host for the groups' sizes."""
    if weight_EOI.dtype is not torch.bfloat16 or any(size % _GROUPED_ALIGNMENT for size in weight_EOI.shape[1:]):
        return False
    return not weight_EOI.is_cuda or torch.cuda.get_device_capability(weight_EOI.device)[0] in _GROUPED_CAPABILITIES


class MixtureOfExperts:
    """y = sum over chosen experts of weight * expert(x), plus the ungated shared experts; the router is fp32."""

    def __init__(
        self,
        router: Linear,
        bias_E: Tensor,
        num_choices: int,
        norm_min: float,
        experts: Experts,
        shared: FeedForward | None,
    ) -> None:
        self._router, self._bias_E = router, bias_E
        self._num_choices, self._norm_min = num_choices, norm_min
        self._experts, self._shared = experts, shared

    def __call__(self, x_TD: Tensor, is_decode: bool) -> Tensor:
        scores_TE = self._router(x_TD.float(), is_decode)
        weights_Tk, experts_Tk = choose_experts(scores_TE, self._bias_E, self._num_choices, self._norm_min)
        outputs_AD, places_A = self._experts(x_TD, experts_Tk, is_decode)
        shared_TD = None if self._shared is None else self._shared(x_TD, is_decode)
        return combine(outputs_AD, places_A, weights_Tk, shared_TD)
