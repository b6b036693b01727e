"""Exponential and logarithm as every host computes them: the same bits in PyTorch on any device and in C++; knows no logits.

Only additions, multiplications and divisions that IEEE 754 rounds, integer operations and comparisons, each an operation
of its own in the order that is written here: no fused products, and no library's functions, whose last bits differ
between versions and processors. workers/model/native/source/draw.h repeats this line by line.
Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DRAW_VERSION = 2
"""Rises with every change that draws another token from the same logits; part of what workers must agree on (fingerprint)."""
WEIGHT_BITS = 40
"""The weight of the likeliest token is 2 to the power of this."""
_ROOT_HALF = 0x3F3504F3
"""The bits of the fp32 square root of one half."""
_ROUNDING = 12582912.0
"""1.5 * 2^23: adding it, then taking it away, rounds an fp32 number below 2^22 to the nearest integer, of two to the even."""
_EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""(e^r - 1 - r) / r^2 for |r| <= ln(2)/2, highest power first (Cephes' expf)."""
_ATANH_TERMS = tuple(2.0 / power for power in range(21, 0, -2))
"""ln((1+s)/(1-s)) / s, the Taylor series in s^2, highest power first: to 1e-17 for |s| <= 0.1716."""


def logarithm(x: Tensor) -> Tensor:
    """ln x of normal positive fp32 numbers, within 2e-7 of the result or 1e-7, whichever is more; x is left as it is."""
    bits = x.view(torch.int32)
    exponent = (bits - _ROOT_HALF) >> 23
    return logarithm_from((bits - (exponent << 23)).view(torch.float32).sub_(1.0), exponent.float())


def logarithm_from(f: Tensor, exponent: Tensor) -> Tensor:
    """ln((1 + f) 2^exponent) for f in [-0.3, 0.42]: the series of the inverse hyperbolic tangent at f / (f + 2)."""
    s = f / (f + 2.0)
    z = s * s
    series = (z * 0.29874422 + 0.39977449).mul_(z).add_(0.66666777).mul_(z).add_(2.0)
    return series.mul_(s).add_(exponent * 0.69314718)


def weights(logits_RV: Tensor, largest_R1: Tensor) -> Tensor:
    """Integers, as fp32 [R, V], in proportion to e^logit; the largest logit's is 2^40, and one below 1/2 is 0.

    They are integers so that their sums (int64) are exact, and equal in whichever order they are added. What rounding
    to integers changes is less than V * 2^-41 of the largest weight.
    """
    x = torch.sub(logits_RV, largest_R1).clamp_(min=-40.0)
    n = (x * 1.44269504).add_(_ROUNDING).sub_(_ROUNDING)
    r = x.sub_(n * 0.693359375).add_(n * 2.12194440e-4)
    p = r * _EXPONENTIAL[0]
    for term in _EXPONENTIAL[1:-1]:
        p = p.add_(term).mul_(r)
    p = p.add_(_EXPONENTIAL[-1]).mul_(r * r).add_(r).add_(1.0)
    power = n.to(torch.int32).add_(WEIGHT_BITS) << 23
    return power.add_(p.view(torch.int32)).view(torch.float32).round_()


def log_total(total: Tensor) -> Tensor:
    """ln(total / 2^40), float64, of int64 sums of weights that are not 0."""
    x = total.double()
    bits = x.view(torch.int64)
    exponent = ((bits >> 52) - 1023).double()
    m = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(torch.float64)
    is_high = m > 1.4142135623730951
    m, exponent = torch.where(is_high, m * 0.5, m), torch.where(is_high, exponent + 1.0, exponent)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = torch.full_like(z, _ATANH_TERMS[0])
    for term in _ATANH_TERMS[1:]:
        series = series * z + term
    return series * s + (exponent - WEIGHT_BITS) * 0.6931471805599453


@lru_cache(maxsize=1024)
def logarithm_of(value: float) -> float:
    """ln of one number between 1e-37 and 1e37, rounded to fp32 before and after."""
    return float(logarithm(torch.tensor([value], dtype=torch.float32)))


Values = Sequence[object] | npt.NDArray[np.number]


def on_device(values: Values, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a tensor, copied from pinned memory when `device` is CUDA: a copy from other memory waits."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
