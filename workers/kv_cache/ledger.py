"""Keeps account of which tier holds which prefix block, and tells routers what changed; knows hashes, no blocks and no bytes."""

from __future__ import annotations

from itertools import islice

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

    def add(self, block_hash: int, tier: Tier) -> None:
        """The tier holds the block from now on."""
        self._change(block_hash, self._tiers.get(block_hash, 0) | 1 << tier)

    def remove(self, block_hash: int, tier: Tier) -> None:
        """The tier does not hold the block any more."""
        self._change(block_hash, self._tiers.get(block_hash, 0) & ~(1 << tier))

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

    def _change(self, block_hash: int, mask: int) -> None:
        if not self._overflow:
            # A change moves to the end: what became useful last is told last, and routers evict the first.
            self._told[block_hash] = self._told.pop(block_hash, self.best(block_hash))
            if len(self._told) > MAX_PENDING_CHANGES:
                self._overflow = True
                self._told.clear()
        if mask:
            self._tiers[block_hash] = mask
        else:
            self._tiers.pop(block_hash, None)
