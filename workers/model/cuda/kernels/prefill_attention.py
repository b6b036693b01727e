"""Causal attention of prompt chunks over paged keys and values, in tiles of 64 queries at fixed absolute positions.

A tile meets a sequence's blocks one after the other with a running maximum (FlashAttention, Dao et al. 2022, algorithm
1). Tiles start at multiples of 64 and a block is 64 positions, so a row's bits depend on neither chunks nor batch.

Shapes: T rows, H query heads, K key-value heads, C channels of a head, Q = B = 64 queries of a tile, keys of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.runner import BLOCK_SIZE

TILE_COLUMNS = tl.constexpr(5)
"""Columns of a tile: first row of its slice, the slice's start and end, tile number, where its block table begins."""


@triton.jit
def _tile_kernel(
    q, layer, tiles, tables, y, scale,
    BLOCK_STRIDE: tl.constexpr, HALF_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PADDED_C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One tile, one query head."""
    place = tiles + tl.program_id(0) * TILE_COLUMNS
    first_row, start, end = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    tile, table = tl.load(place + 3), tl.load(place + 4)
    head = tl.program_id(1)
    b, c = tl.arange(0, B), tl.arange(0, PADDED_C)
    is_channel = (c < C)[None, :]
    positions = tile * B + b
    is_mine = ((positions >= start) & (positions < end))[:, None] & is_channel
    rows = (first_row + positions - start).to(tl.int64)
    q_QC = tl.load(q + (rows[:, None] * H + head) * C + c[None, :], mask=is_mine, other=0.0)
    peak = tl.full([B], float("-inf"), tl.float32)
    total = tl.zeros([B], tl.float32)
    output = tl.zeros([B, PADDED_C], tl.float32)
    for index in range(0, tile + 1):
        block = tl.load(tables + table + index).to(tl.int64)
        keys = layer + block * BLOCK_STRIDE + (head // G) * HEAD_STRIDE + b[:, None] * C + c[None, :]
        keys_at = index * B + b
        is_value = (keys_at < end)[:, None] & is_channel
        k_BC = tl.load(keys, mask=is_value, other=0.0)
        scores = tl.dot(q_QC, tl.trans(k_BC), input_precision="ieee") * scale
        scores = tl.where(keys_at[None, :] <= positions[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - new_peak[:, None])
        rescale = tl.exp(peak - new_peak)
        v_BC = tl.load(keys + HALF_STRIDE, mask=is_value, other=0.0)
        total = total * rescale + tl.sum(weights, 1)
        output = output * rescale[:, None] + tl.dot(weights.to(v_BC.dtype), v_BC, input_precision="ieee")
        peak = new_peak
    result = (output / total[:, None]).to(y.dtype.element_ty)
    tl.store(y + (rows[:, None] * H + head) * C + c[None, :], result, mask=is_mine)


def prefill_attention(q_THC: Tensor, layer_pool: Tensor, tiles: Tensor, tables: Tensor) -> Tensor:
    """Output [T, H*C] in q's dtype; keys and values of all rows are in `layer_pool` [blocks, 2, K, 64, C] already.

    `tiles` int32 [tiles, 5] and `tables` int32 (block tables end to end) as in StepInputs.
    """
    T, H, C = q_THC.shape
    block_stride, half_stride, head_stride = layer_pool.stride()[:3]
    y = torch.empty(T, H * C, dtype=q_THC.dtype, device=q_THC.device)
    _tile_kernel[(tiles.shape[0], H)](
        q_THC, layer_pool, tiles, tables, y, C**-0.5,
        BLOCK_STRIDE=block_stride, HALF_STRIDE=half_stride, HEAD_STRIDE=head_stride,
        H=H, G=H // layer_pool.shape[2], C=C, PADDED_C=max(16, triton.next_power_of_2(C)), B=BLOCK_SIZE,
        num_warps=4, num_stages=4 // q_THC.itemsize,
    )  # fmt: skip
    return y
