"""What the pool asks of lower tiers and other workers, and which evicted prefix block goes to host memory, which to disk, which is forgotten; moves no byte itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.errors import InvariantViolated
from workers.kv_cache.block_hash import BlockKey
from workers.kv_cache.prefix_cache import Ledger
from workers.kv_cache.use_order import UseOrder
from workers.status import Tier


@dataclass(slots=True, eq=False)
class Promotion:
    """A run of prefix blocks on their way from lower tiers into reserved pool blocks; `blocks[i]` is for `keys[i]`."""

    keys: tuple[BlockKey, ...]
    blocks: tuple[int, ...]
    arrived: set[int] = field(default_factory=set)
    """Positions in `keys` whose bytes are in place and verified."""
    end: int = -1
    """What is at this position and behind it does not come: a run with a hole is of no use."""
    _run: int = 0
    """Positions before this one have arrived."""

    def __post_init__(self) -> None:
        self.end = len(self.keys)

    def fail(self, index: int) -> None:
        self.end = min(self.end, index)

    @property
    def num_arrived(self) -> int:
        """Length of the run that is in place, from its beginning."""
        while self._run in self.arrived:
            self._run += 1
        return min(self._run, self.end)

    @property
    def is_done(self) -> bool:
        return self.num_arrived == self.end


@dataclass(slots=True, eq=False)
class Pull:
    """A run of prefix blocks on their way from another worker's pool into reserved blocks of ours."""

    keys: tuple[BlockKey, ...]
    first_block: int
    """Where they belong in the block table."""
    num_arrived: int | None = None
    """None: under way, and somebody may write into the blocks."""


class LowerTiers(Protocol):
    """Used from the engine's thread. Nothing here waits for a disk."""

    @property
    def ledger(self) -> Ledger: ...

    @property
    def blocks_per_bite(self) -> int:
        """What may be demoted between two steps, where it can wait."""

    def demote(self, evicted: Sequence[tuple[int, BlockKey]]) -> None:
        """These pool blocks are about to be overwritten: copies what is to be kept, before it returns."""

    def holds(self, key: BlockKey) -> Tier | None:
        """The tier that could bring the block back."""

    def pin(self, keys: Sequence[BlockKey]) -> None:
        """Holds blocks in their tier until `unpin`; counted."""

    def unpin(self, keys: Sequence[BlockKey]) -> None: ...

    def begin(self, promotion: Promotion) -> None:
        """Brings pinned blocks back, some with each look for what has come."""

    def promoted(self, keys: Sequence[BlockKey]) -> None:
        """The pool holds the blocks again."""

    def abandon(self, promotion: Promotion) -> None:
        """Nobody wants the rest any more: after this nothing is written into its blocks."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Copy the evicted pool block into this slot of the host tier."""

    key: BlockKey
    slot: int


@dataclass(frozen=True, slots=True)
class Spill:
    """Write the block to disk and answer with `written`. Its bytes are in the slot; None: in the evicted pool block."""

    key: BlockKey
    slot: int | None


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the block's file; before any later Spill."""

    block_hash: int


Command = Keep | Spill | Delete


@dataclass(slots=True)
class _Kept:
    key: BlockKey
    slot: int
    is_above: bool = False
    """The pool holds it too: it may go first, and need not go to the disk when it does."""


class TierBook:
    """Least recently used goes first: from the host tier to the disk tier, and from there for good.

    Bounds are in blocks, since all blocks have the same size. 0 switches a tier off.
    """

    def __init__(self, num_host_blocks: int, num_disk_blocks: int, ledger: Ledger) -> None:
        self._free_slots = list(range(num_host_blocks - 1, -1, -1))
        self._pins: Counter[int] = Counter()
        self._host: UseOrder[_Kept] = UseOrder(self._pins)
        self._num_disk_blocks = num_disk_blocks
        self._disk: UseOrder[int | None] = UseOrder(self._pins)
        """Parent of each block by its hash, None where only its file knows; the whole key is in the file, and compared when it is read."""
        self._writing: dict[int, int] = {}
        self._ledger = ledger
        self._has_host = num_host_blocks > 0
        self.counters: Counter[str] = Counter()

    @property
    def num_host_blocks(self) -> int:
        return len(self._host)

    @property
    def num_disk_blocks(self) -> int:
        """Blocks whose files exist or are being written."""
        return len(self._disk) + len(self._writing)

    def holds(self, key: BlockKey) -> Tier | None:
        """The fastest tier with this block; the hash alone is not believed, and the disk's word not before it has been read."""
        kept = self._host.get(key.block_hash, None)
        if kept is not None and kept.key == key:
            return Tier.HOST
        return Tier.DISK if self._disk.get(key.block_hash, -1) in (key.parent, None) else None

    def slot_of(self, key: BlockKey) -> int:
        """Where the host tier keeps a block that it holds."""
        kept = self._host.get(key.block_hash, None)
        if kept is None:
            raise InvariantViolated(f"the host tier does not hold block {key.block_hash:016x}")
        return kept.slot

    def pin(self, keys: Iterable[BlockKey]) -> None:
        """Pinned blocks stay in their tier. Counted."""
        for block_hash, _, _ in keys:
            self._pins[block_hash] += 1
            self._host.pinned(block_hash)
            self._disk.pinned(block_hash)

    def unpin(self, keys: Iterable[BlockKey]) -> None:
        for block_hash, _, _ in keys:
            if self._pins[block_hash] <= 0:
                raise InvariantViolated(f"block {block_hash:016x} was unpinned more often than pinned")
            self._pins[block_hash] -= 1
            if not self._pins[block_hash]:
                del self._pins[block_hash]
                self._host.unpinned(block_hash)
                self._disk.unpinned(block_hash)

    def demote(self, key: BlockKey, can_write: bool) -> list[Command]:
        """The pool has evicted a block. `can_write`: one more block may be given to the disk now."""
        if not self._has_host:
            return self._spill(key, None, can_write)
        kept = self._host.get(key.block_hash, None)
        if kept is not None:
            kept.is_above = False
            self._host.used(key.block_hash)
            return []
        commands: list[Command] = []
        if not self._free_slots:
            victim = self._host.coldest()
            if victim is None:
                return self._spill(key, None, can_write)
            old = self._forget_kept(victim)
            self.counters["kv_host_evicted_blocks"] += 1
            if not old.is_above:
                commands += self._spill(old.key, old.slot, can_write)
        slot = self._free_slots.pop()
        self._host.put(key.block_hash, _Kept(key, slot))
        self._ledger.add((key.block_hash,), Tier.HOST)
        return [*commands, Keep(key, slot)]

    def promoted(self, keys: Iterable[BlockKey]) -> None:
        """The pool holds the blocks again: the host tier's copies are the first to go, the disk's the last."""
        for block_hash, _, _ in keys:
            kept = self._host.get(block_hash, None)
            if kept is not None:
                kept.is_above = True
                self._host.spare(block_hash)
            else:
                self._disk.used(block_hash)

    def written(self, block_hash: int) -> None:
        """A Spill has succeeded."""
        parent = self._writing.pop(block_hash, None)
        if parent is not None:
            self._disk.put(block_hash, parent)
            self._ledger.add((block_hash,), Tier.DISK)

    def spoiled(self, key: BlockKey, tier: Tier) -> list[Command]:
        """What a tier kept of the block is not what was put there."""
        if tier is Tier.HOST and key.block_hash in self._host:
            self._forget_kept(key.block_hash)
        elif tier is Tier.DISK and key.block_hash in self._disk:
            self._disk.pop(key.block_hash)
            self._ledger.remove(key.block_hash, Tier.DISK)
            return [Delete(key.block_hash)]
        return []

    def restore(self, hashes: Iterable[int]) -> list[Command]:
        """Blocks that an earlier process left on the disk, least recently used first; later calls bring those used later."""
        if not self._num_disk_blocks:
            return []
        for block_hash in hashes:
            if block_hash not in self._disk and block_hash not in self._writing:
                self._disk.put(block_hash, None)
                self._ledger.add((block_hash,), Tier.DISK)
        deletions: list[Command] = []
        while len(self._disk) > self._num_disk_blocks and (coldest := self._disk.coldest()) is not None:
            deletions.append(self._evict_from_disk(coldest))
        return deletions

    def close_disk(self) -> None:
        """The disk tier is off from now on, with all it holds."""
        for block_hash in self._disk:
            self._ledger.remove(block_hash, Tier.DISK)
        self._disk.clear()
        self._writing.clear()
        self._num_disk_blocks = 0

    def _spill(self, key: BlockKey, slot: int | None, can_write: bool) -> list[Command]:
        if key.block_hash in self._writing:
            return []
        if key.block_hash in self._disk:
            self._disk.used(key.block_hash)
            return []
        if not self._num_disk_blocks:
            return []
        commands: list[Command] = []
        victim = self._disk.coldest() if self.num_disk_blocks >= self._num_disk_blocks else None
        if not can_write or (victim is None and self.num_disk_blocks >= self._num_disk_blocks):
            self.counters["kv_disk_dropped_blocks"] += 1
            return []
        if victim is not None:
            commands.append(self._evict_from_disk(victim))
        self._writing[key.block_hash] = key.parent
        return [*commands, Spill(key, slot)]

    def _forget_kept(self, block_hash: int) -> _Kept:
        kept = self._host.pop(block_hash)
        self._free_slots.append(kept.slot)
        self._ledger.remove(block_hash, Tier.HOST)
        return kept

    def _evict_from_disk(self, block_hash: int) -> Delete:
        self._disk.pop(block_hash)
        self._ledger.remove(block_hash, Tier.DISK)
        self.counters["kv_disk_evicted_blocks"] += 1
        return Delete(block_hash)
