"""The dense pieces of a layer: packed linear, RMSNorm, SwiGLU. Each row's result is the same whatever rows stand beside it.

Shapes: T rows, D hidden, I inputs, O outputs, F feed-forward width.

Of rotary embeddings: T tokens, H heads, C channels of a head, L positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_ROWS = 4
"""oneDNN computes one row by another kernel, with other bits; a padded row is also faster than a single one."""
_TILE_ROWS = 32
_PACK_ROWS_HINT = 64
"""Rows the packed layout is chosen for; a hint of 1 is up to twice as slow for batches."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linear runs on this machine."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype is not torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model that is served in `dtype` computes in: float32 for bfloat16 that oneDNN has no instructions for.

    PyTorch emulates bfloat16 products on such a machine, which takes ten times as long; float32 weights take twice the
    memory. Keys and values are kept in `dtype` all the same.
    """
    return dtype if dtype is torch.float32 or can_pack(dtype) else torch.float32


class Linear:
    """y = x W^T without bias, W [O, I] kept in the layout of oneDNN's matmul kernels.

    oneDNN gives a row the same bits in every batch of at least four rows (checked by workers.model.cpu.self_test). Where
    that fails, or cannot be had, `use_tiles` computes fixed tiles of 32 rows, padded with zeros.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.num_outputs, self.num_inputs = weight_OI.shape
        self.dtype = weight_OI.dtype
        self._packed = can_pack(weight_OI.dtype)
        self._tiled = not self._packed
        self._weight: Tensor = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _PACK_ROWS_HINT)
            if self._packed
            else weight_OI.clone()  # it may be a view of the mapped file
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        num_rows = x_TI.shape[0]
        if not num_rows:
            return x_TI.new_empty(0, self.num_outputs)
        if not self._tiled:
            if num_rows >= _MIN_ROWS:
                return self._multiply(x_TI)
            return self._multiply(F.pad(x_TI, (0, 0, 0, _MIN_ROWS - num_rows)))[:num_rows]
        padded_TI = F.pad(x_TI, (0, 0, 0, -num_rows % _TILE_ROWS))
        return torch.cat([self._multiply(tile) for tile in torch.split(padded_TI, _TILE_ROWS)])[:num_rows]

    @property
    def is_tiled(self) -> bool:
        return self._tiled

    def weight(self) -> Tensor:
        """W [O, I] as it was given, bit for bit."""
        return self._weight.to_dense() if self._packed else self._weight

    def use_tiles(self) -> None:
        """Computes fixed 32-row tiles from now on: slower, and invariant wherever a row's place in a tile does not matter."""
        self._tiled = True

    def _multiply(self, x_TI: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x_TI, self._weight)
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, None, "none", [], "")
        return y_TO


class RMSNorm:
    """x / rms(x) in fp32, cast, times the weight in the model's dtype (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self._weight_D, self._eps = weight_D, eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        wide_TD = x_TD.float()
        scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + self._eps)
        return (wide_TD * scale_T1).to(x_TD.dtype) * self._weight_D


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) in fp32.

    torch's own silu evaluates the elements at a chunk's end by another formula than the rest, so its bits change with
    the size of the batch and the number of threads; exp and the four basic operations do not.
    """
    return x / torch.neg(x).exp_().add_(1)


class FeedForward:
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up as one product (Shazeer 2020, eq. 6)."""

    def __init__(self, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
        self.gate_up = Linear(torch.cat((gate_FD, up_FD)))
        self.down = Linear(down_DF)

    def __call__(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD).float().chunk(2, dim=-1)
        return self.down((silu(gate_TF) * up_TF).to(x_TD.dtype))

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.gate_up, self.down)


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
