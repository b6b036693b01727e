"""The two ends of a mixture of experts: which experts a row takes, and the sum of what they return.

Shapes: T rows, E experts, k chosen for a row, A = T*k assignments, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COMBINE_WIDTH = 1024


@triton.jit
def _choose_kernel(
    scores, bias, weights, experts, norm_min,
    E: tl.constexpr, NUM_CHOICES: tl.constexpr, PADDED_E: tl.constexpr, PADDED_CHOICES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, PADDED_E), tl.arange(0, PADDED_CHOICES)
    scores_E = tl.load(scores + t * E + e, mask=e < E, other=float("-inf"))
    shifted = tl.exp(scores_E - tl.max(scores_E, 0))
    probability = shifted / tl.sum(shifted, 0)
    rank = tl.where(e < E, probability + tl.load(bias + e, mask=e < E, other=0.0), float("-inf"))
    chosen = tl.zeros([PADDED_CHOICES], tl.int32)
    weight = tl.zeros([PADDED_CHOICES], tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        best = tl.argmax(rank, 0)
        chosen = tl.where(k == choice, best, chosen)
        weight = tl.where(k == choice, tl.sum(tl.where(e == best, probability, 0.0), 0), weight)
        rank = tl.where(e == best, float("-inf"), rank)
    weight = weight / tl.maximum(tl.sum(weight, 0), norm_min)
    tl.store(experts + t * NUM_CHOICES + k, chosen, mask=k < NUM_CHOICES)
    tl.store(weights + t * NUM_CHOICES + k, weight, mask=k < NUM_CHOICES)


def choose_experts(scores_TE: Tensor, bias_E: Tensor, num_choices: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """Weights fp32 [T, k] that sum to one, and expert ids int32 [T, k], from fp32 router scores: as workers.model.decoder.moe.ExpertRouter.

    Of equal candidates the lowest id comes first.
    """
    T, E = scores_TE.shape
    weights = torch.empty(T, num_choices, dtype=torch.float32, device=scores_TE.device)
    experts = torch.empty(T, num_choices, dtype=torch.int32, device=scores_TE.device)
    _choose_kernel[(T,)](
        scores_TE, bias_E, weights, experts, norm_min,
        E=E, NUM_CHOICES=num_choices, PADDED_E=triton.next_power_of_2(E),
        PADDED_CHOICES=triton.next_power_of_2(num_choices), num_warps=1,
    )  # fmt: skip
    return weights, experts


@triton.jit
def _combine_kernel(
    outputs, places, weights, shared, y,
    HAS_SHARED: tl.constexpr, NUM_CHOICES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        place = tl.load(places + t * NUM_CHOICES + choice).to(tl.int64)
        weight = tl.load(weights + t * NUM_CHOICES + choice)
        total += tl.load(outputs + place * D + d, mask=d < D, other=0.0).to(tl.float32) * weight
    if HAS_SHARED:
        total += tl.load(shared + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + t * D + d, total.to(y.dtype.element_ty), mask=d < D)


def combine(outputs_AD: Tensor, places_A: Tensor, weights_Tk: Tensor, shared_TD: Tensor | None) -> Tensor:
    """Weighted sum of each row's expert outputs, in the order of its choices, plus the shared experts': [T, D].

    `places_A` says where the output of each (row, choice) stands. Sums are fp32.
    """
    (T, num_choices), D = weights_Tk.shape, outputs_AD.shape[1]
    y_TD = torch.empty(T, D, dtype=outputs_AD.dtype, device=outputs_AD.device)
    width = min(_COMBINE_WIDTH, triton.next_power_of_2(D))
    _combine_kernel[(T, triton.cdiv(D, width))](
        outputs_AD, places_A, weights_Tk, outputs_AD if shared_TD is None else shared_TD, y_TD,
        HAS_SHARED=shared_TD is not None, NUM_CHOICES=num_choices, D=D, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return y_TD
