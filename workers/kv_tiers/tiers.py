"""The tiers below the KV pool: carries out what the TierBook decides, in host memory and through the disk's thread.

Every block is verified before it is used: its key (tokens, parent, hash) when it is looked up, its checksum when it is copied.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from workers.errors import RankLost
from workers.kv_cache.block_hash import BlockKey
from workers.kv_cache.prefix_cache import Ledger
from workers.kv_cache.tier_book import Command, Delete, Keep, Promotion, Spill, TierBook
from workers.kv_memory.memory import KvMemory
from workers.kv_tiers.disk import DiskFailed, DiskThread, ReadBlock, Written
from workers.kv_tiers.folder import BlockFolder, Scanned, checksum
from workers.machine.pressure import MemoryWatch
from workers.status import Tier

log = logging.getLogger(__name__)

MAX_WRITE_BYTES = 64 << 20
"""Blocks that wait to be written; beyond that a block is dropped instead."""

SCAN_WAIT_S = 2.0
"""A start waits so long for what an earlier process left on the disk; what is found later is used from then on."""

View = npt.NDArray[np.uint8]


class KvTiers:
    """Implements workers.kv_cache.tier_book.LowerTiers. The engine's thread uses it.

    The host tier takes real memory as it fills. `folder` None or `num_disk_blocks` 0: no disk tier.
    """

    def __init__(
        self,
        memory: KvMemory,
        num_host_blocks: int,
        folder: BlockFolder | None = None,
        num_disk_blocks: int = 0,
        watch: MemoryWatch | None = None,
    ) -> None:
        """While `watch` says so no block comes from above; those that are here stay."""
        self._memory = memory
        self._watch = watch
        block_bytes = memory.layout.block_bytes
        self._ledger = Ledger()
        self._book = TierBook(num_host_blocks, num_disk_blocks if folder is not None else 0, self._ledger)
        self._host: View = np.empty((num_host_blocks, block_bytes), np.uint8)
        self._checksums = [0] * num_host_blocks
        self._waiting: dict[int, list[tuple[Promotion, int]]] = {}
        """Promotions by the hash of a block that is being read, with its position in each."""
        self._rising: deque[tuple[Promotion, int]] = deque()
        """Promotions, with the positions in them of blocks that are in host memory and go up next."""
        self._num_left = self.blocks_per_bite
        """Blocks that may still be copied up before the next `poll`."""
        self._counters: Counter[str] = Counter()
        self._disk: DiskThread | None = None
        self._ending: DiskThread | None = None
        """A disk that was switched off, until its last write has ended."""
        if folder is not None:
            self._disk = DiskThread(folder, max(2, MAX_WRITE_BYTES // block_bytes))
            self._disk.wait_scanned(SCAN_WAIT_S)
            self.poll()

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    @property
    def blocks_per_bite(self) -> int:
        return self._memory.blocks_per_bite

    def on_result(self, notify: Callable[[], None]) -> None:
        """`notify` is called, on another thread, when `poll` has something to do."""
        if self._disk is not None:
            self._disk.on_result = notify

    # ---- down ----

    def demote(self, evicted: Sequence[tuple[int, BlockKey]]) -> None:
        """As LowerTiers.demote: all copies out of the pool have ended on return."""
        if self._watch is not None and self._watch.is_short:
            # For those that the host's memory holds already nothing is copied.
            kept = [(block, key) for block, key in evicted if self._book.holds(key) is Tier.HOST]
            self._counters["kv_dropped_blocks"] += len(evicted) - len(kept)
            evicted = kept
        copies: list[tuple[int, BlockKey, int | None, View]] = []
        for block, key in evicted:
            can_write = self._disk is not None and self._disk.can_write
            self._execute(self._book.demote(key, can_write), block, copies)
        self._copy_out(copies)

    def _execute(
        self, commands: Sequence[Command], block: int, copies: list[tuple[int, BlockKey, int | None, View]]
    ) -> None:
        """Adds to `copies` what is to be copied from pool block `block`; they go together, for devices' sake."""
        for command in commands:
            match command:
                case Keep(key, slot):
                    copies.append((block, key, slot, self._host[slot]))
                case Spill(key, None):
                    copies.append((block, key, None, np.empty(self._memory.layout.block_bytes, np.uint8)))
                    self._copy_out(
                        copies
                    )  # the bytes must be with the disk before it is asked whether it can take more
                case Spill(key, slot):
                    assert slot is not None
                    self._copy_out(copies)  # the slot itself may be among them
                    self._write(key, self._host[slot].copy(), self._checksums[slot])
                case Delete(block_hash):
                    if self._disk is not None:
                        self._disk.delete(block_hash)

    def _copy_out(self, copies: list[tuple[int, BlockKey, int | None, View]]) -> None:
        if not copies:
            return
        spoiler = 0
        try:
            self._memory.copy_out([block for block, _, _, _ in copies], [view for _, _, _, view in copies])
        except RankLost as error:
            log.warning("%d evicted blocks cannot be kept: %s", len(copies), error)
            spoiler = 1  # they are refused when they are looked up, as any that are not what they should be
        for _, key, slot, view in copies:
            if slot is None:
                self._write(key, view, checksum(view) ^ spoiler)
            else:
                self._checksums[slot] = checksum(view) ^ spoiler
                self._counters["kv_host_stored_blocks"] += 1
        copies.clear()

    def _write(self, key: BlockKey, payload: View, payload_checksum: int) -> None:
        if self._disk is not None:
            self._disk.write(key, payload, payload_checksum)

    # ---- up ----

    def holds(self, key: BlockKey) -> Tier | None:
        return self._book.holds(key)

    def pin(self, keys: Sequence[BlockKey]) -> None:
        self._book.pin(keys)

    def unpin(self, keys: Sequence[BlockKey]) -> None:
        self._book.unpin(keys)

    def begin(self, promotion: Promotion) -> None:
        """As LowerTiers.begin: what is in host memory is copied with this call and each `poll`, a bite at a time, as is what the
        disk's thread has read by then."""
        for index, key in enumerate(promotion.keys):
            match self._book.holds(key):
                case Tier.HOST:
                    self._rising.append((promotion, index))
                case Tier.DISK if self._disk is not None:
                    waiting = self._waiting.setdefault(key.block_hash, [])
                    if not waiting:
                        self._disk.read(key)
                    waiting.append((promotion, index))
                case _:
                    promotion.fail(index)
                    break
        self._copy_up()

    @property
    def is_copying(self) -> bool:
        """`poll` has more to copy from host memory."""
        return bool(self._rising)

    def _copy_up(self) -> None:
        """Copies verified blocks from host memory, as many as are left of this step's bite."""
        bite: list[tuple[Promotion, int]] = []
        views: list[View] = []
        while self._rising and self._num_left > 0:
            promotion, index = self._rising.popleft()
            if index >= promotion.end:
                continue
            key = promotion.keys[index]
            if self._book.holds(key) is not Tier.HOST:  # it was refused when another prompt wanted it
                promotion.fail(index)
                continue
            self._num_left -= 1
            slot = self._book.slot_of(key)
            if checksum(self._host[slot]) != self._checksums[slot]:
                self._spoil(key, Tier.HOST, "its bytes in host memory have changed")
                promotion.fail(index)
                continue
            bite.append((promotion, index))
            views.append(self._host[slot])
        if not bite:
            return
        has_them = self._copy_in([promotion.blocks[index] for promotion, index in bite], views)
        for promotion, index in bite:
            if has_them:
                promotion.arrived.add(index)
                self._counters["kv_host_hit_blocks"] += 1
            else:
                promotion.fail(index)

    def poll(self) -> None:
        """Once a step: takes over what the disk's thread has done since, and copies the next bite from host memory."""
        self._num_left = self.blocks_per_bite
        self._copy_up()
        if self._disk is None:
            return
        for result in self._disk.take():
            match result:
                case Written(block_hash):
                    self._book.written(block_hash)
                    self._counters["kv_disk_stored_blocks"] += 1
                case ReadBlock():
                    self._on_read(result)
                case Scanned(hashes, num_refused):
                    self._counters["kv_disk_corrupt_blocks"] += num_refused
                    self._execute(self._book.restore(hashes), -1, [])
                case DiskFailed(reason):
                    self._switch_disk_off(reason)
                    return

    def _on_read(self, result: ReadBlock) -> None:
        waiting = self._waiting.pop(result.key.block_hash, [])
        if result.payload is None:
            self._spoil(result.key, Tier.DISK, result.reason)
            for promotion, index in waiting:
                promotion.fail(index)
            return
        for promotion, index in waiting:
            if index < promotion.end:
                if not self._copy_in([promotion.blocks[index]], [result.payload]):
                    promotion.fail(index)
                    continue
                promotion.arrived.add(index)
                self._counters["kv_disk_hit_blocks"] += 1

    def _copy_in(self, blocks: Sequence[int], views: Sequence[View]) -> bool:
        """Whether the model has the blocks now. A group that has lost a rank has not, and computes them."""
        try:
            self._memory.copy_in(blocks, views)
        except RankLost as error:
            log.warning("%d kept blocks cannot be brought back: %s", len(blocks), error)
            return False
        return True

    def promoted(self, keys: Sequence[BlockKey]) -> None:
        self._book.promoted(keys)

    def abandon(self, promotion: Promotion) -> None:
        if self._rising:
            self._rising = deque(entry for entry in self._rising if entry[0] is not promotion)
        for index, key in enumerate(promotion.keys):
            waiting = self._waiting.get(key.block_hash)
            if waiting is not None and (promotion, index) in waiting:
                waiting.remove((promotion, index))

    def _spoil(self, key: BlockKey, tier: Tier, reason: str) -> None:
        log.warning("block %016x of the %s tier is refused: %s", key.block_hash, tier.name.lower(), reason)
        self._counters[f"kv_{tier.name.lower()}_corrupt_blocks"] += 1
        self._execute(self._book.spoiled(key, tier), -1, [])

    # ---- life ----

    def _switch_disk_off(self, reason: str) -> None:
        """A full or broken disk: once, and for good."""
        if self._disk is None:
            return
        log.warning("the KV disk tier is off until the next start: %s", reason)
        self._counters["kv_disk_failures"] += 1
        self._book.close_disk()
        for waiting in self._waiting.values():
            for promotion, index in waiting:
                promotion.fail(index)
        self._waiting.clear()
        self._disk.stop(timeout_s=0.0)
        self._ending, self._disk = self._disk, None

    @property
    def is_idle(self) -> bool:
        """No disk has anything left to do or to tell."""
        return self._disk is None or self._disk.is_idle

    def wait(self, timeout_s: float) -> None:
        """Returns when `poll` has something to do, or nothing is under way, or the time is over."""
        if self._disk is not None and not self._rising:
            self._disk.wait(timeout_s)

    def counters(self) -> tuple[tuple[str, float], ...]:
        """Totals since the start, and what is held now (`kv_host_bytes`, `kv_disk_bytes`)."""
        block_bytes = self._memory.layout.block_bytes
        now = {
            "kv_host_bytes": self._book.num_host_blocks * block_bytes,
            "kv_disk_bytes": self._book.num_disk_blocks * block_bytes,
        }
        totals = self._counters + self._book.counters
        return tuple((name, float(value)) for name, value in sorted({**totals, **now}.items()))

    def close(self) -> None:
        """Ends the disk's thread. Files stay for the next start, but for those it is writing."""
        for disk in (self._disk, self._ending):
            if disk is not None:
                disk.stop()
        self._disk = self._ending = None
