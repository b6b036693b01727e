"""Finds the KV blocks of a prompt's beginning that are in the pool already; knows block ids and hashes, no tensors."""

from __future__ import annotations

from workers.kv_cache.block_hash import BlockKey, PromptBlocks
from workers.kv_cache.ledger import Ledger
from workers.status import Tier


class PrefixCache:
    """Maps chained block hashes (workers.kv_cache.block_hash) to blocks whose bits the prefill path wrote.

    A hash alone is not believed: the entry's tokens and its parent must match too, so a collision is a miss.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._blocks: dict[int, int] = {}
        self._keys: dict[int, BlockKey] = {}
        """By block."""
        self.num_forgotten = 0
        """Blocks so far that were found here and are not any more: what `match` found before may have gone with them."""
        self.num_compared = 0
        """Keys that `match` has compared so far."""

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, prompt: PromptBlocks) -> list[int]:
        """Blocks for the longest cached run of the prompt's usable blocks, in order."""
        blocks: list[int] = []
        for index, block_hash in enumerate(prompt.hashes[: prompt.num_usable]):
            block = self._blocks.get(block_hash)
            if block is None:
                break
            self.num_compared += 1
            if self._keys[block] != prompt.key(index):
                break
            blocks.append(block)
        return blocks

    def has_hash(self, block_hash: int) -> bool:
        """Whether a block with this hash is here; its key may be another."""
        return block_hash in self._blocks

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
        self.num_forgotten += 1
        return key

    def clear(self) -> None:
        """No block holds what it held."""
        for block in list(self._keys):
            self.forget(block)
