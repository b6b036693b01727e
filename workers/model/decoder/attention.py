"""Causal grouped-query attention over a paged KV pool, by two paths whose bits depend on a row's own sequence alone.

Prefill computes query tiles of 64 rows at fixed absolute positions, decode one row against fixed blocks of 64
positions. Every matrix product therefore has a shape that batch and chunking cannot change.

Shapes: T rows of a slice, N decode rows, P (sequence, block) pairs, H query heads, K key-value heads, G = H/K, C
channels of a head, B positions of a block, S positions seen. Scores and sums are fp32 in every model dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.model.decoder.kv_tensors import KvPool
from workers.model.decoder.step_plan import PAIR_MULTIPLE, DecodePlan, PrefillPlan, StepPlan
from workers.runner import BLOCK_SIZE

_SPAN = 2048
"""Positions a prefill tile takes at once; bounds its scores to 64 * H * 2048 floats."""
_GATHER_BYTES = 512 << 10
"""Keys, and as much again of values, that decode copies at once, in fp32: what a core's own cache can hold."""


def attend(q_THC: Tensor, pool: KvPool, layer: int, plan: StepPlan) -> Tensor:
    """Attention output [T, H*C] of all rows of a step, whose keys and values are in the pool already."""
    q_THC = q_THC.float() * q_THC.shape[-1] ** -0.5
    parts = [prefill_attention(q_THC[p.first_row : p.first_row + p.num_rows], pool, layer, p) for p in plan.prefill]
    if plan.decode is not None:
        parts.append(decode_attention(q_THC[plan.decode.first_row :], pool, layer, plan.decode))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def prefill_attention(q_THC: Tensor, pool: KvPool, layer: int, plan: PrefillPlan) -> Tensor:
    """One slice, tile by tile; rows of a tile that lie outside the slice are zeros and their results are dropped."""
    T, H, C = q_THC.shape
    K = pool.layout.num_kv_heads
    keys, values = (half.transpose(0, 1).reshape(K, -1, C) for half in pool.read(layer, plan.blocks))
    offset = plan.start % BLOCK_SIZE
    first_tile = plan.start // BLOCK_SIZE
    num_tiles = plan.blocks.shape[0] - first_tile
    padded = q_THC.new_zeros(num_tiles * BLOCK_SIZE, H, C)
    padded[offset : offset + T] = q_THC
    tiles = padded.view(num_tiles, BLOCK_SIZE, K, H // K, C).permute(0, 2, 3, 1, 4).reshape(num_tiles, K, -1, C)
    outputs = torch.empty_like(tiles)
    for index in range(num_tiles):
        num_seen = (first_tile + index + 1) * BLOCK_SIZE
        outputs[index] = _attend_tile(tiles[index], keys[:, :num_seen], values[:, :num_seen])
    rows = outputs.view(num_tiles, K, H // K, BLOCK_SIZE, C).permute(0, 3, 1, 2, 4).reshape(-1, H * C)
    return rows[offset : offset + T]


def _attend_tile(q_KRC: Tensor, k_KSC: Tensor, v_KSC: Tensor) -> Tensor:
    """One tile (R = G*64 rows, group-major) over all S positions up to the tile's end, in spans with a running maximum.

    The rescaling between spans is that of FlashAttention (Dao et al. 2022, algorithm 1).
    """
    K, R, C = q_KRC.shape
    S = k_KSC.shape[1]
    hidden = torch.ones(BLOCK_SIZE, BLOCK_SIZE, dtype=torch.bool).triu(1)
    maximum = q_KRC.new_full((K, R, 1), -torch.inf)
    total = q_KRC.new_zeros(K, R, 1)
    output = q_KRC.new_zeros(K, R, C)
    for first in range(0, S, _SPAN):
        last = min(first + _SPAN, S)
        scores = torch.bmm(q_KRC, k_KSC[:, first:last].mT)
        if last == S:
            scores.view(K, -1, BLOCK_SIZE, last - first)[..., -BLOCK_SIZE:].masked_fill_(hidden, -torch.inf)
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights = scores.sub_(new_maximum).exp_()
        rescale = torch.exp(maximum - new_maximum)
        total = total * rescale + weights.sum(-1, keepdim=True)
        output = output * rescale + torch.bmm(weights, v_KSC[:, first:last])
        maximum = new_maximum
    return output / total


def decode_attention(q_NHC: Tensor, pool: KvPool, layer: int, plan: DecodePlan) -> Tensor:
    """One query a sequence: each (sequence, block) pair alone, then a sum over a sequence's blocks in their order.

    This is Flash-Decoding (Dao et al. 2023) with splits of one block, so that a split is never chosen by the batch.
    """
    N, H, C = q_NHC.shape
    K, G, P = pool.layout.num_kv_heads, H // pool.layout.num_kv_heads, plan.block_P.shape[0]
    q_NKGC = q_NHC.view(N, K, G, C)
    output_PKGC, total_PKG1, maximum_PKG1 = _attend_blocks(q_NKGC, pool, layer, plan)

    index = plan.sum_P[:, None, None, None].expand(P, K, G, 1)
    peak = maximum_PKG1.new_full((N + 1, K, G, 1), -torch.inf).scatter_reduce_(0, index, maximum_PKG1, "amax")
    rescale_PKG1 = torch.exp(maximum_PKG1 - peak.index_select(0, plan.sum_P))
    # index_add_ adds slice after slice in the order of its index
    total = total_PKG1.new_zeros(N + 1, K, G, 1).index_add_(0, plan.sum_P, total_PKG1 * rescale_PKG1)
    output = output_PKGC.new_zeros(N + 1, K, G, C).index_add_(0, plan.sum_P, output_PKGC * rescale_PKG1)
    return (output[:N] / total[:N]).view(N, H * C)


def _attend_blocks(q_NKGC: Tensor, pool: KvPool, layer: int, plan: DecodePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalized output [P, K, G, C], sum of weights [P, K, G, 1] and largest score [P, K, G, 1] of each pair."""
    K, C = q_NKGC.shape[1], q_NKGC.shape[3]
    pair_bytes = K * BLOCK_SIZE * C * 4
    size = max(1, _GATHER_BYTES // (pair_bytes * PAIR_MULTIPLE)) * PAIR_MULTIPLE
    outputs, totals, maxima = [], [], []
    for first in range(0, plan.block_P.shape[0], size):
        group = slice(first, first + size)
        k_PKBC, v_PKBC = pool.read(layer, plan.block_P[group])
        scores = torch.matmul(q_NKGC.index_select(0, plan.query_P[group]), k_PKBC.mT)
        scores.masked_fill_(plan.hidden_PB[group, None, None], -torch.inf)
        maximum = scores.amax(-1, keepdim=True)
        weights = scores.sub_(maximum).exp_()
        outputs.append(torch.matmul(weights, v_PKBC))
        totals.append(weights.sum(-1, keepdim=True))
        maxima.append(maximum)
    if len(outputs) == 1:
        return outputs[0], totals[0], maxima[0]
    return torch.cat(outputs), torch.cat(totals), torch.cat(maxima)
