"""Finds the KV blocks of a prompt's beginning that are in the pool already, and keeps account of which tier holds which block, for routers; knows block ids and hashes, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from workers.kv_cache.block_hash import BlockKey, PromptBlocks
from workers.status import KvEvent, Tier

MAX_PENDING_CHANGES = 65_536
"""Changes kept between two frames; beyond that the next event is a full dump."""

MAX_TOLD = 1_000_000
"""Blocks named in a full dump, those of the fastest tiers first: a huge disk tier must still fit into a message."""

_BEST = {mask: next((tier for tier in Tier if mask >> tier & 1), None) for mask in range(1 << len(Tier))}


class Ledger:
    """A block may be in several tiers at once; routers hear of the fastest one."""

    def __init__(self) -> None:
        self._tiers: dict[int, int] = {}
        """Bit t: tier t holds the block. No entry: none does."""
        self._told: dict[int, Tier | None] = {}
        """What routers believe of the blocks that changed since the last event."""
        self._overflow = False
        self._sequence = 0

    def add(self, block_hashes: Iterable[int], tier: Tier) -> None:
        """The tier holds the blocks from now on."""
        tiers, bit = self._tiers, 1 << tier
        for block_hash in block_hashes:
            before = tiers.get(block_hash, 0)
            self._note(block_hash, before)
            tiers[block_hash] = before | bit

    def remove(self, block_hash: int, tier: Tier) -> None:
        """The tier does not hold the block any more."""
        before = self._tiers.get(block_hash, 0)
        self._note(block_hash, before)
        after = before & ~(1 << tier)
        if after:
            self._tiers[block_hash] = after
        else:
            self._tiers.pop(block_hash, None)

    def best(self, block_hash: int) -> Tier | None:
        return _BEST[self._tiers.get(block_hash, 0)]

    def take_event(self) -> KvEvent | None:
        """What changed since the last call, numbered; None when nothing did."""
        if self._overflow:
            return self.dump()
        stored: dict[int, Tier] = {}
        removed: list[int] = []
        for block_hash, told in self._told.items():
            now = self.best(block_hash)
            if now is None and told is not None:
                removed.append(block_hash)
            elif now is not None and now is not told:
                stored[block_hash] = now
        self._told = {}
        if not stored and not removed:
            return None
        return self._event(stored, tuple(removed), reset=False)

    def dump(self) -> KvEvent:
        """The full set of blocks, numbered so that the next change follows it."""
        self._told, self._overflow = {}, False
        everything = {block_hash: tier for block_hash, mask in self._tiers.items() if (tier := _BEST[mask]) is not None}
        if len(everything) > MAX_TOLD:
            by_tier = ((h, tier) for wanted in Tier for h, tier in everything.items() if tier is wanted)
            everything = dict(islice(by_tier, MAX_TOLD))
        return self._event(everything, (), reset=True)

    def _event(self, stored: dict[int, Tier], removed: tuple[int, ...], reset: bool) -> KvEvent:
        self._sequence += 1
        is_plain = all(tier is Tier.POOL for tier in stored.values())
        tiers = () if is_plain else tuple(stored.values())
        return KvEvent(self._sequence, tuple(stored), removed, reset, tiers)

    def _note(self, block_hash: int, before: int) -> None:
        """The block is about to change; `before` are its tiers until now."""
        if not self._overflow:
            # A change moves to the end: what became useful last is told last, and routers evict the first.
            told = self._told
            told[block_hash] = told.pop(block_hash, _BEST[before])
            if len(told) > MAX_PENDING_CHANGES:
                self._overflow = True
                told.clear()


class PrefixCache:
    """Maps chained block hashes (workers.kv_cache.block_hash) to blocks whose bits are those that the prefill path writes.

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

    def publish(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """Makes full, finished blocks findable. The first block of a hash stays; a later twin is ignored."""
        fresh = []
        for block, key in zip(blocks, keys, strict=True):
            block_hash = key.block_hash
            if block_hash not in self._blocks and block not in self._keys:
                self._blocks[block_hash] = block
                self._keys[block] = key
                fresh.append(block_hash)
        self._ledger.add(fresh, Tier.POOL)

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
