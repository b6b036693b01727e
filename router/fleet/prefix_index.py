"""Knows which worker caches which KV blocks, as far as the workers have told; a hint that only affects where requests go."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from workers.status import KvEvent, Tier

Counts = npt.NDArray[np.int64]

SHARD_BLOCKS = 4096
"""So many blocks at most are gone through at once, and so large is what the interpreter copies when a table grows."""
STEP_BLOCKS = 512
"""So many blocks of an event are taken in at once; the rest waits for the next event or tick."""
_FEW_BITS = 16


@dataclass(frozen=True, slots=True)
class Prefixes:
    """How much of one prompt each worker caches, in blocks, indexed by the worker's number."""

    cached: Counts
    """First blocks without a gap, in whatever tier."""
    in_pool: Counts
    """First blocks without a gap that need not be brought back from a lower tier."""


@dataclass(slots=True)
class _Shard:
    """Blocks whose hashes end alike, in the order in which they became known or were last kept."""

    holders: dict[int, int] = field(default_factory=dict)
    """Block hash -> set of slots, bit s for slot s."""
    lower: dict[int, int] = field(default_factory=dict)
    """Of these, the slots whose workers hold the block in host memory or on disk only; no entry: none."""
    used: set[int] = field(default_factory=set)
    """Blocks that a request used since they became known or were last kept."""

    def forget(self, block_hash: int, slots: int) -> None:
        """These slots do not hold the block any more."""
        left = self.holders.get(block_hash, 0) & ~slots
        if left:
            self.holders[block_hash] = left
            self.lift(block_hash, slots)
        else:
            self.remove(block_hash)

    def remove(self, block_hash: int) -> None:
        self.holders.pop(block_hash, None)
        self.lower.pop(block_hash, None)
        self.used.discard(block_hash)

    def lift(self, block_hash: int, slots: int) -> None:
        """What these slots hold of the block is in their pools, or nowhere."""
        lower = self.lower.get(block_hash, 0)
        if lower & ~slots:
            self.lower[block_hash] = lower & ~slots
        elif lower:
            del self.lower[block_hash]

    def evict(self, num_blocks: int) -> int:
        """Looks at the first `num_blocks`: those that were used go to the end, the others out. Returns how many went out."""
        num_evicted = 0
        for block_hash in list(islice(self.holders, num_blocks)):
            if block_hash in self.used:
                self.used.remove(block_hash)
                self.holders[block_hash] = self.holders.pop(block_hash)
            else:
                self.remove(block_hash)
                num_evicted += 1
        return num_evicted


@dataclass(slots=True)
class _Slot:
    """A bit of the sets, lent to one worker until it is lost or tells everything anew."""

    number: int
    is_live: bool = True
    is_used: bool = False
    """Some block may carry the bit."""


@dataclass(slots=True)
class _Follower:
    """One worker whose events are followed."""

    slot: _Slot
    last_sequence: int = 0
    awaits_dump: bool = False


@dataclass(slots=True)
class _Change:
    """What a worker has told and is not in the table yet: the first `num_removed` and the first `num_stored` blocks."""

    slot: _Slot
    removed: tuple[int, ...]
    stored: tuple[int, ...]
    tiers: tuple[Tier, ...]
    num_removed: int
    num_stored: int


class PrefixIndex:
    """Block hash -> set of workers: one table for all workers, so that one walk over a prompt's blocks finds what each of them has.

    At most `max_blocks` blocks; beyond that those are forgotten first that became known first and that no request used since,
    and of a full dump no more is taken in than the worker's share, or what is free. A set is the bits of an integer. A worker
    that is lost costs nothing: its bit is ignored from then on, and given to another worker when the shards have been swept,
    one of them each time a bit is wanted.

    A block takes at most 180 bytes beside its set; that takes 28 bytes and 4 for each 30 workers, and as much again while some
    of them hold the block in a lower tier only.
    """

    def __init__(self, max_blocks: int) -> None:
        num_shards = 1 << max(0, (max_blocks // SHARD_BLOCKS).bit_length() - 1)
        self._max_blocks = max_blocks
        self._max_shard_blocks = max(1, max_blocks // num_shards)
        self._shards = [_Shard() for _ in range(num_shards)]
        self._last_shard = num_shards - 1
        self._followers: dict[int, _Follower] = {}
        self._changes: deque[_Change] = deque()
        self._worker_of = np.zeros(64, np.int64)
        """By number of a slot."""
        self._live = 0
        """Slots of followers."""
        self._num_slots = 0
        self._free: list[int] = []
        self._retired: deque[tuple[int, int]] = deque()
        """Numbers of slots that blocks may still carry, and the sweep after which none does."""
        self._num_swept = 0
        self.version = 0
        """Rises with each change of what `match` would find."""
        self.backlog = 0
        """Blocks that workers have told of and that are not in the table yet."""
        self.num_evicted = 0
        self.num_visited = 0
        """Blocks looked at, whatever for."""

    def __len__(self) -> int:
        """Blocks that are known."""
        return sum(len(shard.holders) for shard in self._shards)

    @property
    def num_slots(self) -> int:
        """Bits that a set of workers may have."""
        return self._num_slots

    def attach(self, worker: int) -> None:
        """Starts afresh with a worker that has just connected; its first event is number 1, or a reset, or a gap."""
        self.drop(worker)
        self._followers[worker] = _Follower(self._take_slot(worker))

    def drop(self, worker: int) -> None:
        """Forgets a worker."""
        follower = self._followers.pop(worker, None)
        if follower is not None:
            self._retire(follower.slot)

    def apply(self, worker: int, event: KvEvent) -> bool:
        """Takes over what a worker said. True: an event was missed, ask the worker for a dump (once, until it comes).

        While a dump is awaited, other events change nothing: the dump will contain them. An event that comes while more than
        `max_blocks` blocks wait counts as missed.
        """
        follower = self._followers.get(worker)
        if follower is None:
            return False
        if event.reset:
            if follower.slot.is_used:
                self._retire(follower.slot)
                follower.slot = self._take_slot(worker)
            follower.awaits_dump = False
        elif follower.awaits_dump or event.sequence <= follower.last_sequence:
            return False
        elif event.sequence != follower.last_sequence + 1 or self.backlog > self._max_blocks:
            follower.awaits_dump = True
            return True
        follower.last_sequence = event.sequence
        stored = event.stored
        if event.reset:
            share = self._max_blocks // len(self._followers)
            stored = stored[: max(share, self._max_blocks - len(self) - self.backlog)]
        follower.slot.is_used = follower.slot.is_used or bool(stored)
        counts = len(event.removed), len(stored)
        self._changes.append(_Change(follower.slot, event.removed, stored, event.tiers, *counts))
        self.backlog += sum(counts)
        self.take_in()
        return False

    def take_in(self) -> None:
        """Goes on with what workers have told, STEP_BLOCKS at most."""
        budget = STEP_BLOCKS
        while self._changes and budget > 0:
            change = self._changes[0]
            if not change.slot.is_live:
                self.backlog -= change.num_removed + change.num_stored
                self._changes.popleft()
                continue
            num_removed = min(budget, change.num_removed)
            num_stored = min(budget - num_removed, change.num_stored)
            self._remove(change, num_removed)
            self._store(change, num_stored)
            budget -= num_removed + num_stored
            self.backlog -= num_removed + num_stored
            if not change.num_removed and not change.num_stored:
                self._changes.popleft()
        self.version += 1

    def match(self, hashes: Sequence[int], num_workers: int) -> Prefixes:
        """What workers 0 .. num_workers - 1, which are all there are, have of a prompt with these blocks."""
        shards, last_shard = self._shards, self._last_shard
        holding = in_pool = self._live
        ends: list[tuple[int, int]] = []
        """(number of blocks, slots that have no more than those)"""
        pool_ends: list[tuple[int, int]] = []
        count = 0
        for block_hash in hashes:
            shard = shards[block_hash & last_shard]
            still = holding & shard.holders.get(block_hash, 0)
            if still != holding:
                ends.append((count, holding ^ still))
                holding = still
                if not still:
                    break
            if shard.lower:
                fallen = in_pool & still & shard.lower.get(block_hash, 0)
                if fallen:
                    pool_ends.append((count, fallen))
                    in_pool ^= fallen
            count += 1
        ends.append((count, holding))
        self.num_visited += min(count + 1, len(hashes))
        cached = np.zeros(num_workers, np.int64)
        self._write(ends, cached)
        if not pool_ends:
            return Prefixes(cached, cached)
        pool = cached.copy()
        self._write(pool_ends, pool)
        return Prefixes(cached, pool)

    def touch(self, hashes: Iterable[int]) -> None:
        """A request with these cached blocks went to a worker: keep them longest."""
        for block_hash in hashes:
            shard = self._shards[block_hash & self._last_shard]
            if block_hash in shard.holders:
                shard.used.add(block_hash)

    def _remove(self, change: _Change, num_blocks: int) -> None:
        slots = 1 << change.slot.number
        for block_hash in change.removed[change.num_removed - num_blocks : change.num_removed]:
            self._shards[block_hash & self._last_shard].forget(block_hash, slots)
        change.num_removed -= num_blocks
        self.num_visited += num_blocks

    def _store(self, change: _Change, num_blocks: int) -> None:
        """From the last block on: a child is forgotten before its parent."""
        bit, stored, tiers = 1 << change.slot.number, change.stored, change.tiers
        shards, last_shard, max_shard_blocks = self._shards, self._last_shard, self._max_shard_blocks
        first = change.num_stored - num_blocks
        for place in range(change.num_stored - 1, first - 1, -1):
            block_hash = stored[place]
            shard = shards[block_hash & last_shard]
            holders = shard.holders
            holders[block_hash] = holders.get(block_hash, 0) | bit
            if tiers and tiers[place] is not Tier.POOL:
                shard.lower[block_hash] = shard.lower.get(block_hash, 0) | bit
            elif shard.lower:
                shard.lift(block_hash, bit)
            while len(holders) > max_shard_blocks:
                num_looked_at = max_shard_blocks // 16 or 1
                self.num_evicted += shard.evict(num_looked_at)
                self.num_visited += num_looked_at
        change.num_stored = first
        self.num_visited += num_blocks

    # ---- slots ----

    def _take_slot(self, worker: int) -> _Slot:
        if not self._free and self._retired:
            self._sweep()
        if self._free:
            slot = _Slot(self._free.pop())
        else:
            slot = _Slot(self._num_slots)
            self._num_slots += 1
            if slot.number == len(self._worker_of):
                self._worker_of = np.concatenate([self._worker_of, np.zeros_like(self._worker_of)])
        self._worker_of[slot.number] = worker
        self._live |= 1 << slot.number
        self.version += 1
        return slot

    def _retire(self, slot: _Slot) -> None:
        slot.is_live = False
        self._live &= ~(1 << slot.number)
        self.version += 1
        if slot.is_used:
            self._retired.append((slot.number, self._num_swept + len(self._shards)))
        else:
            self._free.append(slot.number)

    def _sweep(self) -> None:
        """Takes retired slots out of one shard, the next in turn; frees those that are in no shard any more."""
        shard = self._shards[self._num_swept & self._last_shard]
        dead = sum(1 << number for number, _ in self._retired)
        self.num_visited += len(shard.holders)
        for block_hash in [block_hash for block_hash, slots in shard.holders.items() if slots & dead]:
            shard.forget(block_hash, dead)
        self._num_swept += 1
        while self._retired and self._retired[0][1] <= self._num_swept:
            self._free.append(self._retired.popleft()[0])

    def _write(self, ends: list[tuple[int, int]], counts: Counts) -> None:
        """`counts` of the workers behind each set of slots becomes the number beside it."""
        few: list[int] = []
        few_counts: list[int] = []
        for num_blocks, slots in ends:
            if slots.bit_count() > _FEW_BITS:
                packed = np.frombuffer(slots.to_bytes(-(-self._num_slots // 8), "little"), np.uint8)
                counts[self._worker_of[np.flatnonzero(np.unpackbits(packed, bitorder="little"))]] = num_blocks
                continue
            while slots:
                highest = slots.bit_length() - 1
                few.append(highest)
                few_counts.append(num_blocks)
                slots ^= 1 << highest
        if few:
            counts[self._worker_of[few]] = few_counts
