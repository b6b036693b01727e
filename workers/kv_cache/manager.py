"""Gives sequences their KV blocks: matches prefixes, reserves, grows, publishes and frees; integers only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from workers.kv_cache.block_hash import BlockKey, Found, PromptBlocks
from workers.kv_cache.block_pool import BlockPool, OutOfBlocks
from workers.kv_cache.prefix_cache import Ledger, PrefixCache
from workers.kv_cache.tier_book import LowerTiers, Promotion, Pull
from workers.status import KvEvent

NO_SPARE: Mapping[int, int] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in order of position, and how far they are published."""

    prompt: PromptBlocks = field(default_factory=lambda: PromptBlocks(0, 1))
    num_cached: int = 0
    """Blocks at the front that came from the prefix cache."""
    num_published: int = 0
    promotion: Promotion | None = None
    """Blocks behind the cached ones that come from lower tiers."""
    pull: Pull | None = None
    """Blocks behind those that come from another worker."""
    blocks: list[int] = field(default_factory=list, init=False)
    """Changed by `extend` and `cut` alone."""
    _room: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32), init=False)

    @property
    def row(self) -> npt.NDArray[np.int32]:
        """The blocks as every step wants them, int32 [num_blocks]: not a copy, and not to be written to."""
        return self._room[: len(self.blocks)]

    def extend(self, blocks: Sequence[int]) -> None:
        first, end = len(self.blocks), len(self.blocks) + len(blocks)
        if end > len(self._room):  # steps that are running keep the row they have
            self._room = np.concatenate([self.row, np.empty(max(8, end), np.int32)])
        self._room[first:end] = blocks
        self.blocks += blocks

    def cut(self, num_blocks: int) -> list[int]:
        """Keeps so many; returns the others."""
        others = self.blocks[num_blocks:]
        del self.blocks[num_blocks:]
        return others


class KvCacheManager:
    """One pool, one prefix cache, and the tiers below. Methods that take blocks take all they need or raise OutOfBlocks."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_cache: bool = True,
        tiers: LowerTiers | None = None,
        first_block: int = 0,
    ) -> None:
        self.block_size = block_size
        self._tiers = tiers
        self._ledger = Ledger() if tiers is None else tiers.ledger
        self._cache = PrefixCache(self._ledger)
        self._first_block = first_block
        self.is_making_room = False
        """Set by `reserve_prompt` when a prompt waits only for blocks to go to lower tiers, as many with each try as a step allows."""
        self._enabled = prefix_cache
        self._pool = BlockPool(num_blocks, self._evicted, first_block)

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

    def match(self, prompt: PromptBlocks) -> tuple[int, ...]:
        """Blocks of a prompt that `reserve_prompt` would find. Looks them up anew only when one may have gone or come."""
        found = prompt.found.get(self._first_block)
        if found is not None and found.num_forgotten == self._cache.num_forgotten:
            num_found = len(found.blocks)
            if num_found == prompt.num_usable or not self._cache.has_hash(prompt.hashes[num_found]):
                return found.blocks
        found = Found(tuple(self._cache.match(prompt)), self._cache.num_forgotten)
        prompt.found[self._first_block] = found
        return found.blocks

    @property
    def num_compared(self) -> int:
        """Keys of cached blocks that were compared with a prompt's so far."""
        return self._cache.num_compared

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

    def prompt_blocks(self, token_ids: Sequence[int], use_cache: bool = True, salt: int = 0) -> PromptBlocks:
        """The prompt as the other methods take it; caches leave it alone when the prefix cache is off."""
        return PromptBlocks.of(token_ids, self.block_size, use_cache and self._enabled, salt)

    def reserve_prompt(
        self,
        prompt: PromptBlocks,
        use_tiers: bool = False,
        spare: Mapping[int, int] = NO_SPARE,
        room: int = 0,
    ) -> BlockTable:
        """Blocks for a whole prompt and `room` tokens behind it, its cached beginning shared.

        What lower tiers hold of the rest is pinned there until `promote` and `settle`, or `release`; without `use_tiers`
        they are not asked, and what is evicted goes down at once. Raises OutOfBlocks, and evicts nothing, unless `spare[pool]`
        blocks stay available to others; or while many blocks have to go down first, some with each try.
        """
        table = BlockTable(prompt)
        hits = self.match(prompt)
        num_fresh = self.blocks_for(prompt.num_tokens + room) - len(hits)
        num_left = self._pool.num_available - self._pool.num_unheld(hits) - num_fresh
        if num_left < spare.get(0, 0):
            raise OutOfBlocks(f"{num_fresh} blocks wanted beside {len(hits)} cached ones, which would leave {num_left}")
        self._pool.hold(hits)
        if use_tiers and self._tiers is not None and self._pool.num_free + self._tiers.blocks_per_bite < num_fresh:
            self._pool.evict(self._tiers.blocks_per_bite)
            self._pool.release(hits, self._cache.contains)
            self.is_making_room = True
            raise OutOfBlocks(f"of {num_fresh} blocks {self._pool.num_free} are free, others go to lower tiers first")
        lower = self._match_lower(prompt, len(hits)) if use_tiers else []
        fresh = self._pool.allocate(num_fresh)
        table.extend([*hits, *fresh])
        table.num_cached = table.num_published = len(hits)
        if lower:
            table.promotion = Promotion(tuple(lower), tuple(fresh[: len(lower)]))
        return table

    def promote(self, table: BlockTable) -> None:
        """Begins to bring back what lower tiers hold; `settle` once `table.promotion.is_done`, or when it takes too long."""
        if self._tiers is not None and table.promotion is not None:
            self._tiers.begin(table.promotion)

    def plan_pull(self, table: BlockTable, num_blocks: int) -> None:
        """Of a prompt whose first `num_blocks` blocks another worker holds: which of them are wanted from there."""
        promotion = table.promotion
        first = table.num_cached + (len(promotion.keys) if promotion is not None else 0)
        end = min(num_blocks, table.prompt.num_usable)
        if first < end:
            table.pull = Pull(tuple(table.prompt.keys(first, end)), first)

    def settle(self, table: BlockTable) -> None:
        """Publishes what has arrived from lower tiers and other workers; what has not is to be computed."""
        self._settle_promotion(table)
        pull, table.pull = table.pull, None
        if pull is not None and pull.first_block == table.num_cached:
            first, num_arrived = pull.first_block, min(pull.num_arrived or 0, len(pull.keys))
            self._cache.publish(table.blocks[first : first + num_arrived], pull.keys[:num_arrived])
            table.num_cached = table.num_published = first + num_arrived

    def _settle_promotion(self, table: BlockTable) -> None:
        promotion = table.promotion
        if self._tiers is None or promotion is None:
            return
        self._tiers.abandon(promotion)
        num_arrived = promotion.num_arrived
        arrived = promotion.keys[:num_arrived]
        self._cache.publish(promotion.blocks[:num_arrived], arrived)
        self._tiers.unpin(promotion.keys)
        self._tiers.promoted(arrived)
        table.num_cached += num_arrived
        table.num_published = table.num_cached
        table.promotion = None

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Extends the table to hold `num_tokens` tokens."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > 0:
            table.extend(self._pool.allocate(missing))

    def shrink(self, table: BlockTable, num_tokens: int) -> None:
        """Gives back what the table holds beyond `num_tokens` tokens."""
        self._pool.release(table.cut(self.blocks_for(num_tokens)), self._cache.contains)

    def publish_prompt(self, table: BlockTable, num_computed: int) -> None:
        """Makes the prompt's full blocks findable, as far as the prefill path has computed them."""
        full = min(num_computed // self.block_size, len(table.prompt.hashes))
        first = table.num_published
        if first < full:
            self._cache.publish(table.blocks[first:full], table.prompt.keys(first, full))
            table.num_published = full

    def publish_output(self, table: BlockTable, output: Sequence[int]) -> None:
        """Makes the full blocks behind the prompt's findable, with the output tokens whose KV is in them. Only where the decode path
        writes the bits of the prefill path."""
        first = len(table.prompt.hashes)
        if table.num_published == first:
            keys = table.prompt.keys_behind(output)
            self._cache.publish(table.blocks[first : first + len(keys)], keys)

    def release(self, table: BlockTable) -> None:
        """Gives all blocks of a sequence back."""
        if self._tiers is not None and table.promotion is not None:
            self._tiers.abandon(table.promotion)
            self._tiers.unpin(table.promotion.keys)
            table.promotion = None
        self._pool.release(table.cut(0), self._cache.contains)

    def hold_prefix(self, keys: Sequence[BlockKey], max_blocks: int) -> list[int]:
        """The longest run of these blocks that the pool has, held until `release_blocks`."""
        blocks: list[int] = []
        for key in keys[:max_blocks]:
            block = self._cache.find(key)
            if block is None:
                break
            blocks.append(block)
        self._pool.hold(blocks)
        return blocks

    def release_blocks(self, blocks: Sequence[int]) -> None:
        self._pool.release(blocks, self._cache.contains)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises InvariantViolated unless these lists of blocks are all that is held here, and no block is lost or in two states."""
        self._pool.check(block for blocks in holders for block in blocks)

    def take_event(self) -> KvEvent | None:
        return self._ledger.take_event()

    def dump(self) -> KvEvent:
        return self._ledger.dump()

    def _match_lower(self, prompt: PromptBlocks, first: int) -> list[BlockKey]:
        """The run of blocks from number `first` on that lower tiers hold, pinned there."""
        tiers, run = self._tiers, list[BlockKey]()
        if tiers is not None:
            if first < prompt.num_usable and tiers.holds(prompt.key(first)) is not None:
                run = list(takewhile(lambda key: tiers.holds(key) is not None, prompt.keys(first, prompt.num_usable)))
            tiers.pin(run)
        return run

    def _evicted(self, blocks: list[int]) -> None:
        evicted = [(block, self._cache.forget(block)) for block in blocks]
        if self._tiers is not None:
            self._tiers.demote(evicted)
