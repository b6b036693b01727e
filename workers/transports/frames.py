"""The header before the bytes of a piece on every byte stream: whose piece it is, and how long. Knows no sockets."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from workers.errors import TransferFailed

MAX_PIECE_BYTES = 256 << 20
"""More than a layer of a block can have; a longer frame is not ours."""
_MAGIC = 0x324E5442  # "BTN2"
_HEADER = struct.Struct("<I16sIIIII")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Frame:
    """`length` bytes follow: those from `offset` on of a piece of `total` bytes. `key` is transfer_key(transfer id).

    `joins`: on transports that move several pieces at once, it moves together with the frame before it.
    """

    key: bytes
    piece: int
    offset: int
    length: int
    total: int
    joins: bool = False

    @property
    def is_last(self) -> bool:
        return self.offset + self.length == self.total


def transfer_key(transfer_id: str) -> bytes:
    """16 bytes that stand for a transfer id of any length."""
    return hashlib.blake2b(transfer_id.encode(), digest_size=16).digest()


def pack(frame: Frame) -> bytes:
    return _HEADER.pack(_MAGIC, frame.key, frame.piece, frame.offset, frame.length, frame.total, frame.joins)


def unpack(header: bytes | bytearray | memoryview) -> Frame:
    """Raises TransferFailed: after a header that makes no sense nothing on this stream does."""
    if len(header) < HEADER_BYTES:
        raise TransferFailed("a frame is shorter than its header")
    magic, key, piece, offset, length, total, joins = _HEADER.unpack_from(header)
    if magic != _MAGIC or total > MAX_PIECE_BYTES or offset + length > total or joins > 1:
        raise TransferFailed("a frame has no sensible header")
    return Frame(key, piece, offset, length, total, bool(joins))
