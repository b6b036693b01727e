"""Checks at start-up that this machine's kernels give a row the same bits in every batch; under a second, no model input."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from workers.kv_memory.memory import KvLayout, KvMemory
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.decoder.attention import attend
from workers.model.decoder.ernie import Ernie
from workers.model.decoder.kv_tensors import KvPool, kv_layout
from workers.model.decoder.layers import Linear
from workers.model.decoder.step_plan import plan_step
from workers.runner import BLOCK_SIZE, Batch, SequenceSlice

logger = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 7, 16, 33, 64, 300)
_MAX_PRODUCT = 2e9
"""Multiplications of the largest product tried; a larger matrix is tried with fewer rows."""
_LENGTHS = (1, 64, 65, 150)


def require_invariance(model: Ernie, dtype: torch.dtype) -> tuple[str, ...]:
    """Warnings about kernels whose bits depend on the batch; such linears compute fixed tiles from then on.

    `model.linears` are the products of every layer, of routers, experts and the head. `dtype` is that of keys and values.
    """
    warnings = []
    if not linears_are_invariant(model.linears):
        for linear in model.linears:
            linear.use_tiles()
        outcome = "computing in fixed tiles, which is slower"
        if not linears_are_invariant(model.linears):
            outcome = "in fixed tiles too: tokens may differ between runs"
        warnings.append(f"linear kernels of this machine depend on the batch; {outcome}")
    if not attention_is_invariant(model.config, dtype):
        warnings.append("attention kernels of this machine depend on the batch; tokens may differ between runs")
    for warning in warnings:
        logger.warning(warning)
    return tuple(warnings)


def linears_are_invariant(linears: Iterable[Linear]) -> bool:
    """Whether one linear of each shape gives the last rows of a large batch the same bits in smaller ones."""
    by_shape = {(linear.num_inputs, linear.num_outputs, linear.dtype): linear for linear in linears}
    return all(_is_invariant(linear) for linear in by_shape.values())


def _is_invariant(linear: Linear) -> bool:
    affordable = _MAX_PRODUCT / (linear.num_inputs * linear.num_outputs)
    counts = [rows for rows in _ROWS if rows <= max(8, affordable)]
    x_TI = _numbers(counts[-1], linear.num_inputs).to(linear.dtype)
    y_TO = linear(x_TI)
    return all(torch.equal(linear(x_TI[-rows:].contiguous()), y_TO[-rows:]) for rows in counts[:-1])


def attention_is_invariant(config: ErnieConfig, dtype: torch.dtype) -> bool:
    """Whether sequences get the same bits alone, together, and with their prompt cut in two."""
    pool = _random_pool(kv_layout(config, dtype, num_blocks=len(_LENGTHS) * 3))
    H, C = config.num_heads, config.head_dim
    queries = [_numbers(length, H * C).view(length, H, C).to(dtype) for length in _LENGTHS]
    tables = [tuple(range(3 * i, 3 * i + 3)) for i in range(len(_LENGTHS))]

    def run(prefill: list[tuple[int, int, int]], decode: list[int]) -> Tensor:
        """Attention of prefill pieces (sequence, start, end) and of the last token of some sequences."""
        pieces = [SequenceSlice(i, (0,) * (end - start), start, tables[i]) for i, start, end in prefill]
        tokens = [SequenceSlice(i, (0,), _LENGTHS[i] - 1, tables[i]) for i in decode]
        rows = [queries[i][start:end] for i, start, end in prefill] + [queries[i][-1:] for i in decode]
        return attend(torch.cat(rows), pool, 0, plan_step(Batch(tuple(pieces), tuple(tokens)), pool))

    everyone = list(range(len(_LENGTHS)))
    together = run([(i, 0, _LENGTHS[i]) for i in everyone], everyone)
    *prompts, tokens = torch.split(together, [*_LENGTHS, len(_LENGTHS)])
    for i in everyone:
        cut = _LENGTHS[i] // 3
        parts = [run([piece], []) for piece in ((i, 0, cut), (i, cut, _LENGTHS[i])) if piece[1] < piece[2]]
        if not (torch.equal(torch.cat(parts), prompts[i]) and torch.equal(run([], [i]), tokens[i : i + 1])):
            return False
    return True


def _random_pool(layout: KvLayout) -> KvPool:
    memory = KvMemory(
        KvLayout(layout.num_blocks, 1, layout.num_kv_heads, BLOCK_SIZE, layout.head_dim, layout.dtype, layout.itemsize)
    )
    dtype: torch.dtype = getattr(torch, layout.dtype)
    values = torch.from_numpy(memory.bytes).view(dtype)
    values.copy_(_numbers(layout.num_blocks, values.numel() // layout.num_blocks).flatten())
    return KvPool(memory)


def _numbers(rows: int, columns: int) -> Tensor:
    """Fixed values that look random, fp32 [rows, columns], without touching torch's generator."""
    return torch.sin(torch.arange(rows * columns, dtype=torch.float32).square_().remainder_(9973)).view(rows, columns)
