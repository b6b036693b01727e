"""Names the KV blocks of a prompt by content; worker and router compute the same names. Knows no pool and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash

_MASK_64 = (1 << 64) - 1


def block_hashes(token_ids: Sequence[int], block_size: int, salt: int = 0) -> list[int]:
    """Hashes of the full blocks of a prompt, unsigned 64 bit, first block first; a trailing partial block has none.

    A hash is xxh3_64 over the parent's hash (8 bytes little endian; `salt` for the first block) and the block's tokens
    (int32 little endian each), so equal hashes mean equal prefixes. Prompts with different salts share no block.
    """
    return _hashes(token_bytes(token_ids[: len(token_ids) // block_size * block_size]), block_size, salt)


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """int32 little endian each."""
    return np.array(token_ids, dtype="<i4").tobytes()


def token_ids(written: bytes) -> list[int]:
    """What `token_bytes` has written."""
    ids: list[int] = np.frombuffer(written, "<i4").tolist()
    return ids


def _hashes(tokens: bytes, block_size: int, salt: int = 0) -> list[int]:
    block_bytes = 4 * block_size
    digest = xxhash.xxh3_64_intdigest
    parent = salt & _MASK_64
    hashes: list[int] = []
    for start in range(0, len(tokens), block_bytes):
        parent = digest(parent.to_bytes(8, "little") + tokens[start : start + block_bytes])
        hashes.append(parent)
    return hashes


class BlockKey(NamedTuple):
    """What names a full prompt block beyond doubt. `parent` is the hash of the block before it, 0 for the first.

    Many are kept, one a cached block, and those of a long prompt are made and compared between two steps: so it is a tuple, and the
    tokens are bytes, as `token_bytes` writes them.
    """

    block_hash: int
    parent: int
    tokens: bytes

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_ids(self.tokens))

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4


@dataclass(frozen=True, slots=True)
class Found:
    """What a cache had of a prompt when it was last looked through, and how many blocks it had forgotten by then."""

    blocks: tuple[int, ...]
    num_forgotten: int


@dataclass(slots=True, eq=False)
class PromptBlocks:
    """The full blocks of one prompt, by content, and what was found of them. With no hashes caches neither give nor take."""

    num_tokens: int
    block_size: int
    hashes: list[int] = field(default_factory=list)
    tokens: bytes = b""
    """Of the full blocks."""
    found: dict[int, Found] = field(default_factory=dict)
    """By the first block of a cache's pool."""

    @classmethod
    def of(cls, token_ids: Sequence[int], block_size: int, use_cache: bool = True) -> PromptBlocks:
        if not use_cache:
            return cls(len(token_ids), block_size)
        tokens = token_bytes(token_ids[: len(token_ids) // block_size * block_size])
        return cls(len(token_ids), block_size, _hashes(tokens, block_size), tokens)

    @property
    def num_usable(self) -> int:
        """Blocks that a cache may give: at least the last token stays to be computed, since its logits are wanted."""
        return min(len(self.hashes), (self.num_tokens - 1) // self.block_size)

    def key(self, index: int) -> BlockKey:
        """Of block number `index`."""
        return self.keys(index, index + 1)[0]

    def keys(self, first: int, end: int) -> list[BlockKey]:
        """Of the blocks number first .. end-1."""
        size, tokens = 4 * self.block_size, self.tokens
        hashes = self.hashes[first:end]
        parents = [self.hashes[first - 1] if first else 0, *hashes[:-1]]
        starts = range(first * size, end * size, size)
        return [
            BlockKey(block_hash, parent, tokens[start : start + size])
            for block_hash, parent, start in zip(hashes, parents, starts, strict=True)
        ]
