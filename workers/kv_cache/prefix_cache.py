"""Finds the KV blocks of a prompt's beginning that are in the pool already; knows block ids and hashes, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.kv_cache.ledger import Ledger
from workers.status import Tier


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What names a full prompt block beyond doubt. `parent` is the hash of the block before it, 0 for the first."""

    block_hash: int
    parent: int
    token_ids: tuple[int, ...]


def block_key(hashes: Sequence[int], token_ids: Sequence[int], index: int, block_size: int) -> BlockKey:
    """The key of a prompt's block number `index`."""
    tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
    return BlockKey(hashes[index], hashes[index - 1] if index else 0, tokens)


class PrefixCache:
    """Maps chained block hashes (workers.kv_cache.block_hash) to blocks whose bits the prefill path wrote.

    A hash alone is not believed: the entry's tokens and its parent must match too, so a collision is a miss.
    """

    def __init__(self, block_size: int, ledger: Ledger) -> None:
        self._block_size = block_size
        self._ledger = ledger
        self._blocks: dict[int, int] = {}
        self._keys: dict[int, BlockKey] = {}
        """By block."""

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, hashes: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """Blocks for the longest cached run of the prompt's full blocks, in order."""
        blocks: list[int] = []
        for index, block_hash in enumerate(hashes):
            block = self._blocks.get(block_hash)
            if block is None or self._keys[block] != block_key(hashes, token_ids, index, self._block_size):
                break
            blocks.append(block)
        return blocks

    def find(self, key: BlockKey) -> int | None:
        """The block with exactly this key."""
        block = self._blocks.get(key.block_hash)
        return block if block is not None and self._keys[block] == key else None

    def publish(self, block: int, key: BlockKey) -> None:
        """Makes a full, finished prompt block findable. The first block of a hash stays; a later twin is ignored."""
        if key.block_hash in self._blocks or block in self._keys:
            return
        self._blocks[key.block_hash] = block
        self._keys[block] = key
        self._ledger.add(key.block_hash, Tier.POOL)

    def contains(self, block: int) -> bool:
        return block in self._keys

    def forget(self, block: int) -> BlockKey:
        """The pool evicted this block; returns what it held."""
        key = self._keys.pop(block)
        del self._blocks[key.block_hash]
        self._ledger.remove(key.block_hash, Tier.POOL)
        return key

    def clear(self) -> None:
        """No block holds what it held."""
        for block in list(self._keys):
            self.forget(block)
