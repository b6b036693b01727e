"""Names the KV blocks of a prompt by content; worker and router compute the same names. Knows no pool and no cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

_MASK_64 = (1 << 64) - 1


def block_hashes(token_ids: Sequence[int], block_size: int, salt: int = 0) -> list[int]:
    """Hashes of the full blocks of a prompt, unsigned 64 bit, first block first; a trailing partial block has none.

    A hash is xxh3_64 over the parent's hash (8 bytes little endian; `salt` for the first block) and the block's tokens
    (int32 little endian each), so equal hashes mean equal prefixes. Prompts with different salts share no block.
    """
    num_blocks = len(token_ids) // block_size
    if num_blocks == 0:
        return []
    token_bytes = np.array(token_ids[: num_blocks * block_size], dtype="<i4").tobytes()
    block_bytes = 4 * block_size
    digest = xxhash.xxh3_64_intdigest
    parent = salt & _MASK_64
    hashes: list[int] = []
    for start in range(0, len(token_bytes), block_bytes):
        parent = digest(parent.to_bytes(8, "little") + token_bytes[start : start + block_bytes])
        hashes.append(parent)
    return hashes
