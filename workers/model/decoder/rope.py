"""Rotary position embedding as ERNIE 4.5 applies it: over interleaved channel pairs of the whole head, in fp32.

Shapes: T tokens, H heads, C channels of a head, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians per position of each channel pair, fp32 [C/2] (Su et al. 2021, eq. 15).

    Powers are taken in double and rounded once: PyTorch's own differ in the last bit from processor to processor.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / torch.tensor([theta**exponent for exponent in exponents.tolist()], dtype=torch.float32)


class RotaryEmbedding:
    """Cosines and sines of every position up to `max_len` (Su et al. 2021, section 3.4.2)."""

    def __init__(self, head_dim: int, theta: float, max_len: int) -> None:
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies(head_dim, theta))
        self._cos_LP = angles.cos()
        self._sin_LP = angles.sin()

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of each token, fp32 [T, 1, C/2]: ready for `rotate`."""
        return self._cos_LP.index_select(0, positions_T)[:, None], self._sin_LP.index_select(0, positions_T)[:, None]


def rotate(x_THC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each channel pair (2i, 2i+1) of x by its token's angles; computes in fp32, returns x's dtype."""
    cos, sin = rotation
    even, odd = torch.unflatten(x_THC.float(), -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x_THC.dtype)
