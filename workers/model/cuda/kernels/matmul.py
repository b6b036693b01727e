"""Matrix products whose rows have the same bits in every batch: one fixed tile, no split of the inner dimension.

Vendor libraries choose their kernel by the number of rows, and with it the order of additions. One kernel serves dense
weights and groups of rows that meet an expert's weight each; which group a tile belongs to is found on the device.

Shapes: M rows, E experts, O outputs, I inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of the result that one program computes, and how; a row's bits are fixed for a given tile."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


_NARROW_DECODE, _NARROW_PREFILL = Tile(16, 32, 128, 4, 4), Tile(128, 128, 64, 8, 3)
_WIDE_DECODE, _WIDE_PREFILL = Tile(16, 32, 64, 4, 2), Tile(64, 64, 32, 4, 2)


def tile_for(is_decode: bool, dtype: torch.dtype) -> Tile:
    """The tile of few rows or of many; fp32 values take more room, so theirs is smaller."""
    if dtype is torch.float32:
        return _WIDE_DECODE if is_decode else _WIDE_PREFILL
    return _NARROW_DECODE if is_decode else _NARROW_PREFILL


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x, weight, y, ends, M,
    E: tl.constexpr, NUM_OUTPUTS: tl.constexpr, NUM_INPUTS: tl.constexpr, PADDED_E: tl.constexpr,
    TILE_M: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """One tile; with E > 0 rows up to ends[e] belong to expert e, and each expert's rows begin a new tile."""
    tile = tl.program_id(0)
    if E > 0:
        e = tl.arange(0, PADDED_E)
        ends_E = tl.load(ends + e, mask=e < E, other=0)
        starts_E = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
        tiles_E = (ends_E - starts_E + TILE_M - 1) // TILE_M
        upto_E = tl.cumsum(tiles_E, 0)
        expert = tl.sum((upto_E <= tile).to(tl.int32), 0)  # PADDED_E for a tile beyond the last: nothing to do
        first_row = tl.sum(tl.where(e == expert, starts_E + (tile - upto_E + tiles_E) * TILE_M, 0), 0)
        end = tl.sum(tl.where(e == expert, ends_E, 0), 0)
        source = weight + expert.to(tl.int64) * NUM_OUTPUTS * NUM_INPUTS
    else:
        first_row = tile * TILE_M
        end = M
        source = weight
    if first_row < end:
        m = (first_row + tl.arange(0, TILE_M)).to(tl.int64)
        o = (tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)).to(tl.int64)
        total = tl.zeros([TILE_M, TILE_O], tl.float32)
        for first in range(0, NUM_INPUTS, TILE_I):
            i = first + tl.arange(0, TILE_I)
            x_MI = tl.load(
                x + m[:, None] * NUM_INPUTS + i[None, :], mask=(m < end)[:, None] & (i < NUM_INPUTS)[None, :], other=0.0
            )
            w_OI = tl.load(
                source + o[:, None] * NUM_INPUTS + i[None, :],
                mask=(o < NUM_OUTPUTS)[:, None] & (i < NUM_INPUTS)[None, :],
                other=0.0,
            )
            total = tl.dot(x_MI, tl.trans(w_OI), total, input_precision="ieee")
        is_inside = (m < end)[:, None] & (o < NUM_OUTPUTS)[None, :]
        tl.store(y + m[:, None] * NUM_OUTPUTS + o[None, :], total.to(y.dtype.element_ty), mask=is_inside)


def matmul(x_MI: Tensor, weight_OI: Tensor, tile: Tile) -> Tensor:
    """x W^T, [M, O]."""
    num_tiles = triton.cdiv(x_MI.shape[0], tile.rows)
    return _launch(num_tiles, x_MI, weight_OI, None, tile)


def grouped_matmul(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor, tile: Tile) -> Tensor:
    """Rows ends[e-1] .. ends[e] of x times W[e]^T, [M, O]; `ends_E` int32, on the device."""
    num_rows, num_experts = x_MI.shape[0], weight_EOI.shape[0]
    most_tiles = num_rows // tile.rows + min(num_rows, num_experts)  # each expert's last tile may be partly empty
    return _launch(most_tiles, x_MI, weight_EOI, ends_E, tile)


def _launch(num_tiles: int, x_MI: Tensor, weight: Tensor, ends_E: Tensor | None, tile: Tile) -> Tensor:
    num_rows, (num_outputs, num_inputs) = x_MI.shape[0], weight.shape[-2:]
    num_experts = 0 if ends_E is None else weight.shape[0]
    y_MO = torch.empty(num_rows, num_outputs, dtype=x_MI.dtype, device=x_MI.device)
    _matmul_kernel[(num_tiles, triton.cdiv(num_outputs, tile.outputs))](
        x_MI, weight, y_MO, x_MI if ends_E is None else ends_E, num_rows,
        E=num_experts, NUM_OUTPUTS=num_outputs, NUM_INPUTS=num_inputs,
        PADDED_E=triton.next_power_of_2(max(num_experts, 1)),
        TILE_M=tile.rows, TILE_O=tile.outputs, TILE_I=tile.inputs,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y_MO
