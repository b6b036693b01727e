"""Turns a batch of slices into the index tensors of one step, built once and used by every layer; knows no weights.

Rows of the step are the tokens of all slices, prefill first. Shapes: T rows, P (sequence, block) pairs of decode, B
positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.model.decoder.kv_tensors import KvPool
from workers.runner import BLOCK_SIZE, Batch, SequenceSlice

PAIR_MULTIPLE = 4
"""Pairs are padded to a multiple: a lone small matrix product may be split among threads, a batch of them never is."""


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One prefill slice: rows first_row .. first_row+num_rows-1 at positions start .. ; its blocks from position 0 on."""

    first_row: int
    num_rows: int
    start: int
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """All decode slices: the rows from first_row on, and every (sequence, block) pair in order of position.

    `query_P` is the row among the decode rows whose query meets the block; `sum_P` the row that takes the result, which
    for padding is a row beyond the last. `hidden_PB` marks positions that do not exist yet.
    """

    first_row: int
    num_rows: int
    block_P: Tensor
    query_P: Tensor
    sum_P: Tensor
    hidden_PB: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything a layer needs to know of the batch."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots: Tensor
    fresh_blocks: Tensor
    """Blocks that get their first token in this step and are not filled by it."""
    prefill: tuple[PrefillPlan, ...]
    decode: DecodePlan | None


def plan_step(batch: Batch, pool: KvPool) -> StepPlan:
    """The plan of a batch with at least one slice. Raises IndexError where a block table is too short."""
    slices = (*batch.prefill, *batch.decode)
    token_ids = np.concatenate([np.asarray(s.token_ids, dtype=np.int64) for s in slices])
    positions = np.concatenate([np.arange(s.start, s.start + len(s.token_ids)) for s in slices])
    tables = [np.asarray(s.block_table, dtype=np.int64) for s in slices]
    blocks = np.concatenate(
        [
            table[np.arange(s.start, s.start + len(s.token_ids)) // BLOCK_SIZE]
            for s, table in zip(slices, tables, strict=True)
        ]
    )
    offsets = positions % BLOCK_SIZE
    num_prefill = len(batch.prefill)
    first_rows = np.cumsum([0, *(len(s.token_ids) for s in slices)]).tolist()
    return StepPlan(
        token_ids_T=torch.from_numpy(token_ids),
        positions_T=torch.from_numpy(positions),
        slots=pool.slots(torch.from_numpy(blocks), torch.from_numpy(offsets)),
        fresh_blocks=torch.from_numpy(np.setdiff1d(blocks[offsets == 0], blocks[offsets == BLOCK_SIZE - 1])),
        prefill=tuple(
            PrefillPlan(row, len(s.token_ids), s.start, torch.from_numpy(table[: _num_blocks(s)]))
            for s, table, row in zip(batch.prefill, tables, first_rows, strict=False)
        ),
        decode=_plan_decode(batch.decode, tables[num_prefill:], first_rows[num_prefill]) if batch.decode else None,
    )


def _plan_decode(
    slices: Sequence[SequenceSlice], tables: Sequence[np.typing.NDArray[np.int64]], row: int
) -> DecodePlan:
    counts = np.array([_num_blocks(s) for s in slices])
    padding = -int(counts.sum()) % PAIR_MULTIPLE
    blocks = np.concatenate([table[:count] for table, count in zip(tables, counts, strict=True)])
    owners = np.repeat(np.arange(len(slices)), counts)
    num_valid = np.full(len(blocks), BLOCK_SIZE)
    num_valid[np.cumsum(counts) - 1] = [s.start % BLOCK_SIZE + 1 for s in slices]
    hidden_PB = np.arange(BLOCK_SIZE) >= np.pad(num_valid, (0, padding), constant_values=1)[:, None]
    return DecodePlan(
        first_row=row,
        num_rows=len(slices),
        block_P=torch.from_numpy(np.pad(blocks, (0, padding), mode="edge")),
        query_P=torch.from_numpy(np.pad(owners, (0, padding))),
        sum_P=torch.from_numpy(np.pad(owners, (0, padding), constant_values=len(slices))),
        hidden_PB=torch.from_numpy(hidden_PB),
    )


def _num_blocks(piece: SequenceSlice) -> int:
    """Blocks from position 0 to the slice's last token."""
    return -(-(piece.start + len(piece.token_ids)) // BLOCK_SIZE)
