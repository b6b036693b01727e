"""Checksums of KV pieces inside a pool: computed before they are announced, verified after they have arrived. Runs on helper threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.handoff.protocol.messages import KvPiece
from workers.kv_memory.checksum import checksums
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.transports.contract import View

INLINE_BYTES = 2 << 20
"""Up to this many bytes are checksummed on the event loop, in about a tenth of a millisecond; more goes to a helper thread, whose
two changes of thread cost more than that."""


def describe_pieces(memory: KvMemory, cut: Cut, pieces: Sequence[tuple[int, int]]) -> tuple[KvPiece, ...]:
    """Announcements for (piece number, pool block) pairs."""
    places = [(number, cut.slot(number), block) for number, block in pieces]
    found = checksums([memory.block(block, slot.first_layer, slot.num_layers) for _, slot, block in places])
    return tuple(
        KvPiece(number, slot.block, slot.first_layer, slot.num_layers, block, value)
        for (number, slot, block), value in zip(places, found, strict=True)
    )


def verify_pieces(pieces: Sequence[KvPiece], place: Callable[[int], View]) -> tuple[int, ...]:
    """The numbers of those pieces whose bytes, at place(piece number), have the announced checksum."""
    found = checksums([place(piece.piece) for piece in pieces])
    return tuple(piece.piece for piece, value in zip(pieces, found, strict=True) if value == piece.checksum)
