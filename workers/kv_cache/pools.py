"""Several KV pools behind the face of one: gives each sequence a pool of its own choice and keeps it there; integers only.

Pool p has the blocks p * N to (p+1) * N - 1. A prefix is found in the pool that holds it; routers see one set of hashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from workers.kv_cache.block_hash import BlockKey, PromptBlocks
from workers.kv_cache.block_pool import OutOfBlocks
from workers.kv_cache.manager import NO_SPARE, BlockTable, KvCacheManager
from workers.status import KvEvent


class PooledKvCache:
    """`num_pools` managers of `num_blocks` blocks each; the same methods as KvCacheManager."""

    def __init__(self, num_pools: int, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.block_size = block_size
        self._size = num_blocks
        self._pools = [
            KvCacheManager(num_blocks, block_size, prefix_cache, first_block=pool * num_blocks)
            for pool in range(num_pools)
        ]
        self.is_making_room = False
        """There are no tiers below several pools."""
        self._holders: Counter[int] = Counter()
        """In how many pools a hash is."""
        self._sequence = 0

    @property
    def num_blocks(self) -> int:
        return self._size * len(self._pools)

    @property
    def max_sequence_blocks(self) -> int:
        return self._size

    @property
    def num_available(self) -> int:
        return sum(pool.num_available for pool in self._pools)

    @property
    def num_held(self) -> int:
        return sum(pool.num_held for pool in self._pools)

    def pool_of(self, table: BlockTable) -> int:
        return table.blocks[0] // self._size if table.blocks else 0

    def blocks_for(self, num_tokens: int) -> int:
        return self._pools[0].blocks_for(num_tokens)

    @property
    def num_compared(self) -> int:
        return sum(pool.num_compared for pool in self._pools)

    def prompt_blocks(self, token_ids: Sequence[int], use_cache: bool = True, salt: int = 0) -> PromptBlocks:
        return self._pools[0].prompt_blocks(token_ids, use_cache, salt)

    def reserve_prompt(
        self,
        prompt: PromptBlocks,
        use_tiers: bool = False,
        spare: Mapping[int, int] = NO_SPARE,
        room: int = 0,
    ) -> BlockTable:
        """There are no tiers below several pools. In the pool that would then hold the fewest blocks: a cached beginning counts for a pool, its load against it."""

        def after(pool: int) -> int:
            return self._pools[pool].num_held - len(self._pools[pool].match(prompt))

        for pool in sorted(range(len(self._pools)), key=after):
            try:
                return self._pools[pool].reserve_prompt(prompt, spare={0: spare.get(pool, 0)}, room=room)
            except OutOfBlocks:
                continue
        raise OutOfBlocks("no pool has room for this prompt")

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        self._pools[self.pool_of(table)].grow(table, num_tokens)

    def shrink(self, table: BlockTable, num_tokens: int) -> None:
        self._pools[self.pool_of(table)].shrink(table, num_tokens)

    def promote(self, table: BlockTable) -> None:
        self._pools[self.pool_of(table)].promote(table)

    def plan_pull(self, table: BlockTable, num_blocks: int) -> None:
        self._pools[self.pool_of(table)].plan_pull(table, num_blocks)

    def settle(self, table: BlockTable) -> None:
        self._pools[self.pool_of(table)].settle(table)

    def hold_prefix(self, keys: Sequence[BlockKey], max_blocks: int) -> list[int]:
        """From the pool that has the longest run."""
        best: list[int] = []
        for pool in self._pools:
            blocks = pool.hold_prefix(keys, max_blocks)
            best, other = (blocks, best) if len(blocks) > len(best) else (best, blocks)
            self.release_blocks(other)
        return best

    def release_blocks(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._pools[blocks[0] // self._size].release_blocks(blocks)

    def publish_prompt(self, table: BlockTable, num_computed: int) -> None:
        self._pools[self.pool_of(table)].publish_prompt(table, num_computed)

    def publish_output(self, table: BlockTable, output: Sequence[int]) -> None:
        self._pools[self.pool_of(table)].publish_output(table, output)

    def release(self, table: BlockTable) -> None:
        self._pools[self.pool_of(table)].release(table)

    def forget_pool(self, pool: int) -> None:
        self._pools[pool].forget_pool(0)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        lists = [blocks for blocks in holders if blocks]
        for number, pool in enumerate(self._pools):
            pool.check(blocks for blocks in lists if blocks[0] // self._size == number)

    def take_event(self) -> KvEvent | None:
        """What changed for somebody who sees one pool: a hash goes when no pool has it any more."""
        stored: dict[int, None] = {}
        removed: dict[int, None] = {}
        for pool in self._pools:
            event = pool.take_event()
            if event is None:
                continue
            if event.reset:
                return self.dump()
            for block_hash in event.stored:
                self._holders[block_hash] += 1
                if self._holders[block_hash] == 1 and removed.pop(block_hash, 0) == 0:
                    stored[block_hash] = None
            for block_hash in event.removed:
                self._holders[block_hash] -= 1
                if self._holders[block_hash] == 0:
                    del self._holders[block_hash]
                    if stored.pop(block_hash, 0) == 0:
                        removed[block_hash] = None
        if not stored and not removed:
            return None
        self._sequence += 1
        return KvEvent(self._sequence, tuple(stored), tuple(removed))

    def dump(self) -> KvEvent:
        self._holders = Counter(block_hash for pool in self._pools for block_hash in pool.dump().stored)
        self._sequence += 1
        return KvEvent(self._sequence, tuple(self._holders), (), reset=True)
