"""The file format of one KV block on disk: a header that proves what the bytes are, then the bytes. Opens no file."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from workers.errors import BatonError
from workers.kv_cache.block_hash import BlockKey, block_hashes

MAGIC = b"BATONKVB"
VERSION = 1
_FIXED = struct.Struct("<8sII16sQQIQQ")
"""Magic, version, header bytes, fingerprint, block hash, parent hash, number of tokens, payload bytes, payload checksum. Then the token
ids (int32 each) and xxh3_64 of everything before it. All little endian."""


class BadRecord(BatonError):
    """A file that is not what its name says: corrupt, truncated, or of another model."""


@dataclass(frozen=True, slots=True)
class Format:
    """What every file of one worker has in common. `fingerprint` is 16 bytes."""

    fingerprint: bytes
    block_size: int
    block_bytes: int

    @property
    def header_bytes(self) -> int:
        return _FIXED.size + 4 * self.block_size + 8

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + self.block_bytes


def fingerprint_bytes(model_fingerprint: str) -> bytes:
    return xxhash.xxh3_128_digest(model_fingerprint.encode())


def checksum(payload: npt.NDArray[np.uint8]) -> int:
    """xxh3_64 of a block's bytes, contiguous uint8."""
    return xxhash.xxh3_64_intdigest(payload.data)


def encode_header(form: Format, key: BlockKey, payload_checksum: int) -> bytes:
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        form.header_bytes,
        form.fingerprint,
        key.block_hash,
        key.parent,
        key.num_tokens,
        form.block_bytes,
        payload_checksum,
    )
    body = fixed + key.tokens
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def decode_header(form: Format, raw: bytes) -> tuple[BlockKey, int]:
    """The block's key and the checksum of its bytes. Raises BadRecord unless all of it is right for this model."""
    if len(raw) != form.header_bytes:
        raise BadRecord(f"the header has {len(raw)} bytes, not {form.header_bytes}")
    magic, version, header_bytes, fingerprint, block_hash, parent, num_tokens, payload_bytes, payload_checksum = (
        _FIXED.unpack_from(raw)
    )
    if (magic, version, header_bytes) != (MAGIC, VERSION, form.header_bytes):
        raise BadRecord("the file is no KV block of this version")
    if xxhash.xxh3_64_intdigest(raw[:-8]) != int.from_bytes(raw[-8:], "little"):
        raise BadRecord("the header does not match its checksum")
    if fingerprint != form.fingerprint or (num_tokens, payload_bytes) != (form.block_size, form.block_bytes):
        raise BadRecord("the block belongs to another model")
    key = BlockKey(block_hash, parent, raw[_FIXED.size : _FIXED.size + 4 * num_tokens])
    if block_hashes(key.token_ids, form.block_size, parent) != [block_hash]:
        raise BadRecord("the block's hash is not that of its tokens")
    return key, payload_checksum
