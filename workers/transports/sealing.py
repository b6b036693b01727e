"""Keys of a KV connection, from the secret of an offer, and what they do: bytes travel sealed. Knows no sockets.

AES-128-GCM over segments of at most 512 KiB. A segment's nonce is its number on the lane, so one that is lost, repeated, moved or changed
does not open, and neither does anything after it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from workers.errors import TransferFailed

SECRET_BYTES = 32
KEY_BYTES = 16
SEGMENT_BYTES = 512 << 10
"""Stays in a core's second cache between the socket and the cipher. Of 64 KiB the receiver takes a third more time for each byte, for
it wakes and calls more often."""
TAG_BYTES = 16


def session_key(secret: bytes, challenge: bytes) -> bytes:
    """What both ends know of one connection, and nobody else; `challenge` is the receiver's."""
    return hmac.digest(secret, b"session\0" + challenge, hashlib.sha256)


def lane_key(session: bytes, challenge: bytes, call: bytes) -> bytes:
    """Of one lane: `challenge` is the sender's, new with each, so no key is ever used twice."""
    return hmac.digest(session, b"lane\0" + challenge + call, hashlib.sha256)[:KEY_BYTES]


class Seal:
    """One direction of one lane; both ends keep count. For one thread at a time."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._number = 0

    def close(self, segment: memoryview, sealed: memoryview) -> None:
        """Writes the sealed segment, TAG_BYTES longer, to `sealed`."""
        self._cipher.encrypt_into(self._nonce(), segment, None, sealed)

    def open(self, sealed: memoryview, segment: memoryview) -> None:
        """Raises TransferFailed when it is not what the other end sent next; what `segment` then holds is of no use."""
        try:
            self._cipher.decrypt_into(self._nonce(), sealed, None, segment)
        except InvalidTag:
            raise TransferFailed("what came was changed on the way") from None

    def _nonce(self) -> bytes:
        self._number += 1
        return self._number.to_bytes(12, "little")


def segments(buffer: memoryview) -> Iterator[memoryview]:
    """Parts of a buffer that are sealed one by one; both ends cut alike."""
    for at in range(0, buffer.nbytes, SEGMENT_BYTES):
        yield buffer[at : at + SEGMENT_BYTES]
