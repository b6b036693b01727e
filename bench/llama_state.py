"""Lengthens a sequence's state as llama.cpp writes it, so that a long context need not be computed. Knows bytes only.

The layout is that of `llama_state_seq_get_data` in llama.cpp at llama-cpp-python 0.3.36 (src/llama-kv-cache.cpp, state_write):
magic, sequence, number of streams; per stream the number of cells, each cell's position and sequence, then a matrix of keys
per layer, one row a cell, and one of values.
"""

from __future__ import annotations

import struct

_CELL = struct.Struct("<iIi")
"""Position, number of sequences (1), the sequence."""
_MATRIX = struct.Struct("<iQ")
"""Type of the elements, bytes of a row."""


class UnknownState(Exception):
    """The bytes are not laid out as this file expects."""


class _Reader:
    def __init__(self, state: bytes) -> None:
        self._state, self.place = state, 0

    def take(self, count: int) -> bytes:
        taken = self._state[self.place : self.place + count]
        if len(taken) != count:
            raise UnknownState(f"the state ends after {len(self._state)} bytes")
        self.place += count
        return taken

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")


def lengthen(state: bytes, num_cells: int) -> bytes:
    """A state of `num_cells` positions from 0 on, whose keys and values repeat those of `state`. Raises UnknownState."""
    reader = _Reader(state)
    parts = [reader.take(8)]  # magic, sequence
    num_streams = reader.number()
    parts.append(num_streams.to_bytes(4, "little"))
    for _ in range(num_streams):
        num_known = reader.number()
        parts.append((num_cells if num_known else 0).to_bytes(4, "little"))
        if num_known:
            parts += _lengthened_stream(reader, num_known, num_cells)
    if reader.place != len(state):
        raise UnknownState(f"{len(state) - reader.place} bytes of the state are left over")
    return b"".join(parts)


def _lengthened_stream(reader: _Reader, num_known: int, num_cells: int) -> list[bytes]:
    cells = [_CELL.unpack(reader.take(_CELL.size)) for _ in range(num_known)]
    if [cell[:2] for cell in cells] != [(position, 1) for position in range(num_known)]:
        raise UnknownState("the cells are not the positions of one sequence in order")
    parts = [_CELL.pack(position, 1, cells[0][2]) for position in range(num_cells)]
    is_transposed, num_layers = reader.number(), reader.number()
    if is_transposed:
        raise UnknownState("values are transposed: this context runs without flash attention")
    parts += [is_transposed.to_bytes(4, "little"), num_layers.to_bytes(4, "little")]
    for _ in range(2 * num_layers):  # all keys, then all values
        kind, row_bytes = _MATRIX.unpack(reader.take(_MATRIX.size))
        rows = reader.take(num_known * row_bytes)
        repeats, rest = divmod(num_cells, num_known)
        parts += [_MATRIX.pack(kind, row_bytes), rows * repeats + rows[: rest * row_bytes]]
    return parts
