"""Moves and verifies the bytes of KV pieces between a pool and a message or a peer's pool; runs on helper threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from workers.errors import TransferFailed
from workers.kv_transfer.memory import KvLayout, KvMemory, MappedKvMemory
from workers.kv_transfer.messages import KvPiece
from workers.kv_transfer.pieces import Cut

INLINE_BYTES = 256 << 10
"""Up to this many bytes are checksummed or copied on the event loop; more goes to a helper thread."""


def same_shape(a: KvLayout, b: KvLayout) -> bool:
    """Whether blocks of one pool fit into the other; the number of blocks may differ."""
    return (a.num_layers, a.num_kv_heads, a.block_size, a.head_dim, a.dtype) == (
        b.num_layers,
        b.num_kv_heads,
        b.block_size,
        b.head_dim,
        b.dtype,
    )


def _checksum(view: npt.NDArray[np.uint8]) -> int:
    return xxhash.xxh3_64_intdigest(view.data)


def describe_pieces(
    memory: KvMemory, cut: Cut, pieces: Iterable[tuple[int, int]], with_data: bool
) -> tuple[KvPiece, ...]:
    """Announcements for (piece number, pool block) pairs: checksums, and the bytes themselves `with_data`."""
    described = []
    for number, source_block in pieces:
        slot = cut.slot(number)
        view = memory.block(source_block, slot.first_layer, slot.num_layers)
        described.append(
            KvPiece(
                piece=number,
                block=slot.block,
                first_layer=slot.first_layer,
                num_layers=slot.num_layers,
                source_block=source_block,
                checksum=_checksum(view),
                data=view.tobytes() if with_data else b"",
            )
        )
    return tuple(described)


def place_pieces(
    memory: KvMemory,
    blocks: Sequence[int],
    pieces: Iterable[KvPiece],
    shared: MappedKvMemory | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Copies pieces into our pool, from `shared` or from the message, and verifies what arrived.

    `blocks` is our block table. Returns (good, bad) piece numbers; a bad piece leaves bytes that must not be used.
    """
    good: list[int] = []
    bad: list[int] = []
    for piece in pieces:
        target = memory.block(blocks[piece.block], piece.first_layer, piece.num_layers)
        try:
            source = (
                np.frombuffer(piece.data, dtype=np.uint8)
                if shared is None
                else shared.block(piece.source_block, piece.first_layer, piece.num_layers)
            )
            if source.nbytes != target.nbytes:
                raise TransferFailed("a piece has the wrong size")
            np.copyto(target, source)
        except TransferFailed:
            bad.append(piece.piece)
            continue
        (good if _checksum(target) == piece.checksum else bad).append(piece.piece)
    return tuple(good), tuple(bad)
