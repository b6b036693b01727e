"""Names the KV blocks of a prompt by content; worker and router compute the same names. Knows no pool and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xxhash

_MASK_64 = (1 << 64) - 1


def block_hashes(token_ids: Sequence[int], block_size: int, salt: int = 0) -> list[int]:
    """Hashes of the full blocks of a prompt, unsigned 64 bit, first block first; a trailing partial block has none.

    A hash is xxh3_64 over the parent's hash (8 bytes little endian; `salt` for the first block) and the block's tokens
    (int32 little endian each), so equal hashes mean equal prefixes. Prompts with different salts share no block.
    """
    if isinstance(token_ids, PromptTokens):
        return token_ids.chain(block_size, salt).hashes
    return _hashes(token_bytes(token_ids[: len(token_ids) // block_size * block_size]), block_size, salt)


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """int32 little endian each."""
    return np.array(token_ids, dtype="<i4").tobytes()


def token_ids(written: bytes) -> list[int]:
    """What `token_bytes` has written."""
    ids: list[int] = np.frombuffer(written, "<i4").tolist()
    return ids


def keys_behind(parent: int, tokens: bytes, block_size: int) -> list[BlockKey]:
    """Of the full blocks among tokens (as `token_bytes` writes them) that stand behind a block with the hash `parent`, or the salt."""
    size = 4 * block_size
    hashes = _hashes(tokens[: len(tokens) // size * size], block_size, parent)
    parents = [parent, *hashes]
    return [
        BlockKey(block_hash, parents[at], tokens[at * size : (at + 1) * size]) for at, block_hash in enumerate(hashes)
    ]


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
    """What names a full prompt block beyond doubt. `parent` is the hash of the block before it, the salt for the first.

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


class Chain:
    """The full blocks of a prompt, by content and salt: their hashes, and their keys, which are made when the first is wanted."""

    def __init__(self, tokens: bytes, block_size: int, salt: int = 0) -> None:
        self.block_size = block_size
        self.salt = salt
        self.hashes = _hashes(tokens[: len(tokens) // (4 * block_size) * 4 * block_size], block_size, salt)
        self.tokens = tokens

    @cached_property
    def keys(self) -> list[BlockKey]:
        """One a block."""
        tokens, size = self.tokens, 4 * self.block_size
        starts = range(0, len(tokens), size)
        make, new = tuple.__new__, BlockKey
        return [
            make(new, (block_hash, parent, tokens[start : start + size]))
            for block_hash, parent, start in zip(self.hashes, [self.salt, *self.hashes], starts, strict=False)
        ]


class PromptTokens(tuple[int, ...]):
    """Token ids of a prompt, that keep what is worked out of them: whoever passes on the same object, for all choices of a request
    or to several engines, has them hashed and looked at once."""

    @cached_property
    def packed(self) -> bytes:
        """As `token_bytes`. Raises OverflowError for what is no int32."""
        return token_bytes(self)

    @cached_property
    def forms(self) -> dict[str, bytes]:
        """What it looks like in formats that others have written it in, by their names."""
        return {}

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest token id; of a prompt that is not empty."""
        try:
            tokens = np.frombuffer(self.packed, "<i4")
        except OverflowError:
            return min(self), max(self)
        return int(tokens.min()), int(tokens.max())

    @cached_property
    def _chains(self) -> dict[tuple[int, int], Chain]:
        return {}

    def chain(self, block_size: int, salt: int = 0) -> Chain:
        """Its full blocks of so many tokens, named from this salt on."""
        chain = self._chains.get((block_size, salt))
        if chain is None:
            chain = self._chains[block_size, salt] = Chain(self.packed, block_size, salt)
        return chain


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
    chain: Chain | None = None
    hashes: list[int] = field(init=False)
    num_usable: int = field(init=False)
    """Blocks that a cache may give: at least the last token stays to be computed, since its logits are wanted."""
    found: dict[int, Found] = field(default_factory=dict)
    """By the first block of a cache's pool."""

    def __post_init__(self) -> None:
        self.hashes = self.chain.hashes if self.chain is not None else []
        self.num_usable = min(len(self.hashes), max(0, self.num_tokens - 1) // self.block_size)

    @classmethod
    def of(cls, token_ids: Sequence[int], block_size: int, use_cache: bool = True, salt: int = 0) -> PromptBlocks:
        if not use_cache:
            return cls(len(token_ids), block_size)
        prompt = token_ids if isinstance(token_ids, PromptTokens) else PromptTokens(token_ids)
        return cls(len(prompt), block_size, prompt.chain(block_size, salt))

    def key(self, index: int) -> BlockKey:
        """Of block number `index`."""
        assert self.chain is not None
        return self.chain.keys[index]

    def keys_behind(self, output: Sequence[int]) -> list[BlockKey]:
        """Of the full blocks that an output behind this prompt makes, with the prompt's tokens that no full block holds."""
        if self.chain is None:
            return []
        parent = self.hashes[-1] if self.hashes else self.chain.salt
        rest = self.chain.tokens[4 * self.block_size * len(self.hashes) :]
        return keys_behind(parent, rest + token_bytes(output), self.block_size)

    def keys(self, first: int, end: int) -> list[BlockKey]:
        """Of the blocks number first .. end-1."""
        return [] if self.chain is None else self.chain.keys[first:end]
