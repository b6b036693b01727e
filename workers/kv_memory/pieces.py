"""Cuts the blocks of a transfer into numbered pieces; both ends compute the same cut from the layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from workers.kv_memory.memory import KvLayout

MAX_PIECE_BYTES = 512 << 10
"""Part of the protocol: large enough for what is said about a piece to cost nothing beside it, small enough for the first layers
of a block to travel while the last ones are computed."""


def layers_per_piece(layout: KvLayout) -> int:
    """At least one, however large a layer is."""
    return max(1, min(layout.num_layers, MAX_PIECE_BYTES // layout.layer_bytes))


class Slot(NamedTuple):
    """Where a piece belongs: layers of one entry of the block table."""

    block: int
    first_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Pieces 0 .. num_pieces-1 of blocks first_block .. first_block+num_blocks-1, block by block, layers in order.

    A piece has at most MAX_PIECE_BYTES, but always a whole layer of a block.
    """

    layout: KvLayout
    first_block: int
    num_blocks: int

    # Asked for several times with every piece, so they are worked out once.
    layers_per_piece: int = field(init=False, repr=False, compare=False)
    pieces_per_block: int = field(init=False, repr=False, compare=False)
    num_pieces: int = field(init=False, repr=False, compare=False)
    part_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Of each piece of a block."""
    _parts: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    """(first layer, number of layers) of each piece of a block."""

    def __post_init__(self) -> None:
        layout, step = self.layout, layers_per_piece(self.layout)
        firsts = range(0, layout.num_layers, step)
        sizes = [(first, min(step, layout.num_layers - first)) for first in firsts]
        keep = object.__setattr__
        keep(self, "layers_per_piece", step)
        keep(self, "pieces_per_block", len(sizes))
        keep(self, "num_pieces", self.num_blocks * len(sizes))
        keep(self, "part_bytes", tuple(count * layout.layer_bytes for _, count in sizes))
        keep(self, "_parts", tuple(sizes))

    def slot(self, piece: int) -> Slot:
        """Raises IndexError for a number outside the transfer."""
        if not 0 <= piece < self.num_pieces:
            raise IndexError(f"piece {piece} is outside a transfer of {self.num_pieces}")
        block, part = divmod(piece, self.pieces_per_block)
        first, num_layers = self._parts[part]
        return tuple.__new__(Slot, (self.first_block + block, first, num_layers))

    def pieces_before(self, block: int) -> int:
        """How many pieces belong to blocks before this entry of the block table."""
        return min(max(block - self.first_block, 0), self.num_blocks) * self.pieces_per_block

    def pieces_before_layer(self, num_layers: int) -> int:
        """How many pieces of a block are complete once its first `num_layers` layers are."""
        if num_layers >= self.layout.num_layers:
            return self.pieces_per_block
        return num_layers // self.layers_per_piece

    def bytes_of(self, pieces: Iterable[int]) -> int:
        """Of all these pieces, which are of this transfer."""
        sizes, count = self.part_bytes, self.pieces_per_block
        return sum([sizes[piece % count] for piece in pieces])

    def piece_bytes(self, piece: int) -> int:
        """Raises IndexError for a number outside the transfer."""
        if not 0 <= piece < self.num_pieces:
            raise IndexError(f"piece {piece} is outside a transfer of {self.num_pieces}")
        return self.part_bytes[piece % self.pieces_per_block]
