"""Gives sequences their KV blocks: matches prefixes, reserves, grows, publishes and frees; integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.kv_cache.block_hash import block_hashes
from workers.kv_cache.block_pool import BlockPool, OutOfBlocks
from workers.kv_cache.prefix_cache import PrefixCache
from workers.status import KvEvent


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order of position, and how far they are published."""

    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Blocks at the front that came from the prefix cache."""
    num_published: int = 0


class KvCacheManager:
    """One pool, one prefix cache. Methods that take blocks either take all they need or raise OutOfBlocks."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True, first_block: int = 0) -> None:
        self.block_size = block_size
        self._cache = PrefixCache(block_size)
        self._enabled = prefix_cache
        self._pool = BlockPool(num_blocks, self._cache.forget, first_block)

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def max_sequence_blocks(self) -> int:
        """The most blocks that one sequence can have."""
        return self._pool.num_blocks

    def pool_of(self, table: BlockTable) -> int:
        """Which pool a sequence lives in; there is one here, several in workers.kv_cache.pools."""
        return 0

    def available_in(self, pool: int) -> int:
        return self._pool.num_available

    def num_hits(self, token_ids: Sequence[int], hashes: list[int]) -> int:
        """Blocks of a prompt that `reserve_prompt` would find."""
        return len(self._cache.match(hashes[: (len(token_ids) - 1) // self.block_size], token_ids))

    def forget_pool(self, pool: int) -> None:
        """The content of all blocks is gone: nothing is cached any more. Who holds blocks must compute them again."""
        self._cache.clear()
        self._pool.drop_cached()

    @property
    def num_available(self) -> int:
        return self._pool.num_available

    @property
    def num_held(self) -> int:
        return self._pool.num_held

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def prompt_hashes(self, token_ids: Sequence[int]) -> list[int]:
        """Chained hashes of the prompt's full blocks; none when the prefix cache is off."""
        return block_hashes(token_ids, self.block_size) if self._enabled else []

    def reserve_prompt(self, token_ids: Sequence[int], hashes: list[int]) -> BlockTable:
        """Blocks for a whole prompt, its cached beginning shared; with no `hashes` it neither takes nor gives.

        At least the last token stays to be computed, since its logits are wanted.
        """
        table = BlockTable(hashes=hashes)
        usable = (len(token_ids) - 1) // self.block_size
        hits = self._cache.match(table.hashes[:usable], token_ids)
        self._pool.hold(hits)
        try:
            fresh = self._pool.allocate(self.blocks_for(len(token_ids)) - len(hits))
        except OutOfBlocks:
            self._pool.release(hits, self._cache.contains)
            raise
        table.blocks = hits + fresh
        table.num_cached = table.num_published = len(hits)
        return table

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Extends the table to hold `num_tokens` tokens."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > 0:
            table.blocks += self._pool.allocate(missing)

    def publish_prompt(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Makes the prompt's full blocks findable, as far as the prefill path has computed them."""
        size = self.block_size
        full = min(num_computed // size, len(table.hashes))
        for index in range(table.num_published, full):
            parent = table.hashes[index - 1] if index else 0
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            self._cache.publish(table.blocks[index], table.hashes[index], parent, tokens)
        table.num_published = max(table.num_published, full)

    def release(self, table: BlockTable) -> None:
        """Gives all blocks of a sequence back."""
        self._pool.release(table.blocks, self._cache.contains)
        table.blocks = []

    def take_event(self) -> KvEvent | None:
        return self._cache.take_event()

    def dump(self) -> KvEvent:
        return self._cache.dump()
