"""Turns slices into the integers that a step's kernels read, and brings them to the device without a wait; knows no weights.

Shapes: T rows of a step, W columns, N decode rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.runner import BLOCK_SIZE, SequenceSlice
from workers.sampling.arithmetic import on_device

Integers = npt.NDArray[np.int32]
ROW_COLUMNS = 3
_ALIGNMENT = 4
"""Arrays begin at multiples of 16 bytes, so that kernels are compiled for one alignment."""


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """S prefill slices. `tables` int32 [S, columns] are their block tables from position 0 on, filled up with zeros.

    `tiles` int32 [tiles, 5]: first row of the slice, its start and end position, tile number (position // 64), and where
    in `tables` its own begins. `cuts` int32 [S + 1] and `ends` int32 [S]: first rows, with the number of rows at last, and
    end positions. `most_rows` and `longest` bound the rows and the end position of a slice.
    """

    tiles: Tensor
    tables: Tensor
    cuts: Tensor
    ends: Tensor
    most_rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """`rows` int32 [T, W]: token id, position, block that takes the row's keys and values. Without `prefill` each row is a
    sequence of its own that decodes, and the other columns are its block table from position 0 on."""

    rows: Tensor
    prefill: PrefillInputs | None = None


def prefill_arrays(slices: Sequence[SequenceSlice]) -> tuple[Integers, ...]:
    """Rows, and tiles, tables, cuts and ends as in PrefillInputs. Raises IndexError where a block table is too short."""
    ends = [piece.start + len(piece.token_ids) for piece in slices]
    tables = np.zeros((len(slices), -(-max(ends) // BLOCK_SIZE)), dtype=np.int32)
    cuts = np.cumsum([0, *(len(piece.token_ids) for piece in slices)], dtype=np.int32)
    rows, tiles = [], []
    for index, (piece, end) in enumerate(zip(slices, ends, strict=True)):
        table = _table(piece, end)
        tables[index, : len(table)] = table
        positions = np.arange(piece.start, end, dtype=np.int32)
        tokens = np.asarray(piece.token_ids, dtype=np.int32)
        rows.append(np.stack((tokens, positions, table[positions // BLOCK_SIZE]), axis=1))
        for tile in range(piece.start // BLOCK_SIZE, len(table)):
            tiles.append((cuts[index], piece.start, end, tile, index * tables.shape[1]))
    return np.concatenate(rows), np.array(tiles, dtype=np.int32), tables, cuts, np.array(ends, dtype=np.int32)


def fill_decode_rows(rows: Integers, slices: Sequence[SequenceSlice], scratch_block: int) -> None:
    """Writes decode slices to int32 [N, W]; rows beyond them read and write position 0 of the scratch block.

    Raises IndexError where a block table is too short, or longer than W allows.
    """
    for row, piece in zip(rows, slices, strict=False):
        table = _table(piece, piece.start + 1)
        if len(table) > len(row) - ROW_COLUMNS:
            raise IndexError(f"position {piece.start} is beyond the longest sequence of this runner")
        row[:ROW_COLUMNS] = piece.token_ids[0], piece.start, table[-1]
        row[ROW_COLUMNS : ROW_COLUMNS + len(table)] = table
    rows[len(slices) :, : ROW_COLUMNS + 1] = 0, 0, scratch_block, scratch_block


@dataclass(frozen=True, slots=True)
class LateTokens:
    """Tokens that a step has drawn or is still drawing, int64 [R] on the device; `row_of` finds a sequence's own by its id."""

    tokens_R: Tensor
    row_of: Mapping[int, int]

    def fill(self, rows: Tensor, slices: Sequence[SequenceSlice]) -> None:
        """Puts the tokens of late slices into rows int32 [N, W] of decode slices, without a wait."""
        late = [(row, self.row_of[piece.sequence_id]) for row, piece in enumerate(slices) if piece.is_late]
        if late:
            places = on_device(late, rows.device)
            tokens = self.tokens_R.index_select(0, places[:, 1]).to(rows.dtype)
            rows[:, 0].index_copy_(0, places[:, 0], tokens)


def _table(piece: SequenceSlice, end: int) -> Integers:
    num_blocks = -(-end // BLOCK_SIZE)
    if len(piece.block_table) < num_blocks:
        raise IndexError(f"{end} positions need {num_blocks} blocks; the table has {len(piece.block_table)}")
    return np.asarray(piece.block_table[:num_blocks], dtype=np.int32)


class Upload:
    """Host memory that the device can read by itself: pinned where there is a CUDA device, plain elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._host = torch.empty(0, dtype=torch.int32)
        self._sent = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]

    def array(self, size: int) -> Integers:
        """`size` integers to fill and then `send`, once the device has read what was sent before."""
        if self._sent is not None:
            self._sent.synchronize()
        if self._host.numel() < size:
            self._host = torch.empty(2 * size, dtype=torch.int32, pin_memory=self._is_cuda)
        return self._host.numpy()[:size]

    def send(self, target: Tensor) -> None:
        """Starts the copy of the first integers to a contiguous int32 tensor on the device."""
        target.view(-1).copy_(self._host[: target.numel()], non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._device))

    def prefill(self, slices: Sequence[SequenceSlice]) -> StepInputs:
        """The inputs of some prefill slices, on their way to the device."""
        arrays = prefill_arrays(slices)
        sizes = [-(-a.size // _ALIGNMENT) * _ALIGNMENT for a in arrays]
        starts = np.cumsum([0, *sizes]).tolist()
        host = self.array(starts[-1])
        for start, values in zip(starts, arrays, strict=False):
            host[start : start + values.size] = values.ravel()
        device = torch.empty(starts[-1], dtype=torch.int32, device=self._device)
        self.send(device)
        rows, tiles, tables, cuts, lasts = (
            device[start : start + values.size].view(values.shape)
            for start, values in zip(starts, arrays, strict=False)
        )
        most_rows = max(len(piece.token_ids) for piece in slices)
        return StepInputs(rows, PrefillInputs(tiles, tables, cuts, lasts, most_rows, longest=int(arrays[-1].max())))
