"""Checksums of KV pieces inside a pool: computed before they are announced, verified after they have arrived. Runs on helper threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import xxhash

from workers.kv_transfer.memory import KvLayout, KvMemory
from workers.kv_transfer.messages import KvPiece
from workers.kv_transfer.pieces import Cut

INLINE_BYTES = 256 << 10
"""Up to this many bytes are checksummed on the event loop; more goes to a helper thread."""


def same_shape(a: KvLayout, b: KvLayout) -> bool:
    """Whether blocks of one pool fit into the other; the number of blocks may differ."""
    return (a.num_layers, a.num_kv_heads, a.block_size, a.head_dim, a.dtype) == (
        b.num_layers,
        b.num_kv_heads,
        b.block_size,
        b.head_dim,
        b.dtype,
    )


def checksum(view: npt.NDArray[np.uint8]) -> int:
    """xxh3_64 of contiguous bytes."""
    return xxhash.xxh3_64_intdigest(view.data)


def describe_pieces(memory: KvMemory, cut: Cut, pieces: Iterable[tuple[int, int]]) -> tuple[KvPiece, ...]:
    """Announcements for (piece number, pool block) pairs."""
    described = []
    for number, source_block in pieces:
        slot = cut.slot(number)
        view = memory.block(source_block, slot.first_layer, slot.num_layers)
        described.append(
            KvPiece(number, slot.block, slot.first_layer, slot.num_layers, source_block, checksum(view))
        )
    return tuple(described)


def verify_pieces(
    pieces: Iterable[KvPiece], place: Callable[[int], npt.NDArray[np.uint8]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compares what lies at place(piece number) with the announced checksums. Returns (good, bad) piece numbers."""
    good: list[int] = []
    bad: list[int] = []
    for piece in pieces:
        (good if checksum(place(piece.piece)) == piece.checksum else bad).append(piece.piece)
    return tuple(good), tuple(bad)
