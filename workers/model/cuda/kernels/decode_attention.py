"""Attention of one query a sequence over its KV blocks, split along the blocks and combined in a second pass.

The query heads that share a key-value head are one small matrix, so each key is read once (Flash-Decoding, Dao et al.
2023). How many blocks a split takes follows from the sequence's own length and two constants: never from the batch.

Shapes: N rows, H query heads, K key-value heads, G = H/K, C channels of a head, S splits; a block holds 64 positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.runner import BLOCK_SIZE

POSITION_COLUMN = tl.constexpr(1)
TABLE_COLUMN = tl.constexpr(3)
"""Where a row of step inputs keeps its position and its block table (workers.model.cuda.step_inputs)."""


@triton.jit
def _split_kernel(
    q, layer, rows, outputs, sums, scale,
    ROW_STRIDE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HALF_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, MIN_BLOCKS: tl.constexpr,
    PADDED_G: tl.constexpr, PADDED_C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One row, one key-value head, one split: unnormalized output, largest score and sum of weights."""
    n, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(rows + n * ROW_STRIDE + POSITION_COLUMN)
    num_blocks = position // B + 1
    per_split = tl.maximum(MIN_BLOCKS, (num_blocks + S - 1) // S)
    first = split * per_split
    last = tl.minimum(first + per_split, num_blocks)
    if first < last:
        g, c, b = tl.arange(0, PADDED_G), tl.arange(0, PADDED_C), tl.arange(0, B)
        is_channel = (c < C)[None, :]
        is_query = (g < G)[:, None] & is_channel
        heads = n * H + head * G + g
        q_GC = tl.load(q + heads[:, None] * C + c[None, :], mask=is_query, other=0.0)
        peak = tl.full([PADDED_G], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_G], tl.float32)
        output = tl.zeros([PADDED_G, PADDED_C], tl.float32)
        for index in range(first, last):
            block = tl.load(rows + n * ROW_STRIDE + TABLE_COLUMN + index).to(tl.int64)
            keys = layer + block * BLOCK_STRIDE + head * HEAD_STRIDE + b[:, None] * C + c[None, :]
            is_seen = index * B + b <= position
            # what follows the last token in a block may be anything, and zero times anything is not always zero
            is_value = is_seen[:, None] & is_channel
            k_BC = tl.load(keys, mask=is_value, other=0.0)
            scores = tl.dot(q_GC, tl.trans(k_BC), input_precision="ieee") * scale
            scores = tl.where(is_seen[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp(scores - new_peak[:, None])
            rescale = tl.exp(peak - new_peak)
            v_BC = tl.load(keys + HALF_STRIDE, mask=is_value, other=0.0)
            total = total * rescale + tl.sum(weights, 1)
            output = output * rescale[:, None] + tl.dot(weights.to(v_BC.dtype), v_BC, input_precision="ieee")
            peak = new_peak
        place = (n * S + split) * H + head * G + g
        tl.store(outputs + place[:, None] * C + c[None, :], output, mask=is_query)
        tl.store(sums + place * 2, peak, mask=g < G)
        tl.store(sums + place * 2 + 1, total, mask=g < G)


@triton.jit
def _combine_kernel(
    outputs, sums, rows, y,
    ROW_STRIDE: tl.constexpr, H: tl.constexpr, C: tl.constexpr, S: tl.constexpr, MIN_BLOCKS: tl.constexpr,
    PADDED_C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One row, one query head: the splits that were computed, in their order."""
    n, head = tl.program_id(0), tl.program_id(1)
    num_blocks = tl.load(rows + n * ROW_STRIDE + POSITION_COLUMN) // B + 1
    per_split = tl.maximum(MIN_BLOCKS, (num_blocks + S - 1) // S)
    num_splits = (num_blocks + per_split - 1) // per_split
    c = tl.arange(0, PADDED_C)
    place = n * S * H + head
    peak = tl.load(sums + place * 2)
    total = tl.load(sums + place * 2 + 1)
    output = tl.load(outputs + place * C + c, mask=c < C, other=0.0)
    for split in range(1, num_splits):
        place = (n * S + split) * H + head
        split_peak = tl.load(sums + place * 2)
        new_peak = tl.maximum(peak, split_peak)
        rescale = tl.exp(peak - new_peak)
        weight = tl.exp(split_peak - new_peak)
        total = total * rescale + tl.load(sums + place * 2 + 1) * weight
        output = output * rescale + tl.load(outputs + place * C + c, mask=c < C, other=0.0) * weight
        peak = new_peak
    tl.store(y + (n * H + head) * C + c, (output / total).to(y.dtype.element_ty), mask=c < C)


def decode_attention(
    q_NHC: Tensor, layer_pool: Tensor, rows: Tensor, num_splits: int = 16, min_blocks: int = 4
) -> Tensor:
    """Output [N, H*C] in q's dtype. `layer_pool` [blocks, 2, K, 64, C]; `rows` int32 as in StepInputs.

    A sequence is cut into at most `num_splits` runs of at least `min_blocks` blocks. No program is launched for runs that the
    longest table in `rows` cannot have: where there are fewer than `num_splits`, each has `min_blocks` either way.
    """
    num_splits = min(num_splits, triton.cdiv(rows.shape[1] - TABLE_COLUMN.value, min_blocks))
    N, H, C = q_NHC.shape
    K = layer_pool.shape[2]
    block_stride, half_stride, head_stride = layer_pool.stride()[:3]
    outputs = torch.empty(N, num_splits, H, C, dtype=torch.float32, device=q_NHC.device)
    sums = torch.empty(N, num_splits, H, 2, dtype=torch.float32, device=q_NHC.device)
    y = torch.empty(N, H * C, dtype=q_NHC.dtype, device=q_NHC.device)
    padded_c = max(16, triton.next_power_of_2(C))
    _split_kernel[(N, K, num_splits)](
        q_NHC, layer_pool, rows, outputs, sums, C**-0.5,
        ROW_STRIDE=rows.stride(0), BLOCK_STRIDE=block_stride, HALF_STRIDE=half_stride, HEAD_STRIDE=head_stride,
        H=H, G=H // K, C=C, S=num_splits, MIN_BLOCKS=min_blocks,
        PADDED_G=max(16, triton.next_power_of_2(H // K)), PADDED_C=padded_c, B=BLOCK_SIZE, num_warps=4, num_stages=4 // q_NHC.itemsize,
    )  # fmt: skip
    _combine_kernel[(N, H)](
        outputs, sums, rows, y,
        ROW_STRIDE=rows.stride(0), H=H, C=C, S=num_splits, MIN_BLOCKS=min_blocks, PADDED_C=padded_c, B=BLOCK_SIZE,
        num_warps=1,
    )  # fmt: skip
    return y
