"""Knows which worker caches which KV blocks, as far as the workers have told; a hint that only affects where requests go."""

from __future__ import annotations

from collections.abc import Sequence

from workers.status import KvEvent, Tier


class _Table:
    """One worker's blocks, least recently useful first; a dict keeps insertion order."""

    def __init__(self) -> None:
        self.blocks: dict[int, Tier] = {}
        """The fastest tier that holds each block."""
        self.last_sequence = 0
        self.awaits_dump = False

    def refresh(self, hashes: Sequence[int]) -> None:
        """Makes these the most recent. A parent comes after its children, so that children are evicted first."""
        for block_hash in reversed(hashes):
            self.blocks[block_hash] = self.blocks.pop(block_hash, Tier.POOL)

    def store(self, event: KvEvent) -> None:
        """Takes over the blocks that an event names, and their tiers."""
        self.refresh(event.stored)
        if event.tiers:
            self.blocks.update(zip(event.stored, event.tiers, strict=False))
        else:
            self.blocks.update(dict.fromkeys(event.stored, Tier.POOL))


class PrefixIndex:
    """Block hash -> workers, held as one table a worker so that losing a worker costs nothing.

    At most `max_blocks` (block, worker) pairs; beyond that the largest table loses its least recently useful blocks.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._tables: dict[str, _Table] = {}
        self._num_blocks = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return self._num_blocks

    def attach(self, worker_id: str) -> None:
        """Starts afresh with a worker that has just connected; its first event is number 1, or a reset, or a gap."""
        self.drop(worker_id)
        self._tables[worker_id] = _Table()

    def drop(self, worker_id: str) -> None:
        """Forgets a worker."""
        table = self._tables.pop(worker_id, None)
        if table is not None:
            self._num_blocks -= len(table.blocks)

    def apply(self, worker_id: str, event: KvEvent) -> bool:
        """Takes over what a worker said. True: an event was missed, ask the worker for a dump (once, until it comes).

        While a dump is awaited, other events change nothing: the dump will contain them.
        """
        table = self._tables.get(worker_id)
        if table is None:
            return False
        if event.reset:
            self._num_blocks -= len(table.blocks)
            table.blocks = {}
            table.awaits_dump = False
        elif table.awaits_dump or event.sequence <= table.last_sequence:
            return False
        elif event.sequence != table.last_sequence + 1:
            table.awaits_dump = True
            return True
        table.last_sequence = event.sequence
        before = len(table.blocks)
        for block_hash in event.removed:
            table.blocks.pop(block_hash, None)
        table.store(event)
        self._num_blocks += len(table.blocks) - before
        self._evict()
        return False

    def match(self, worker_id: str, hashes: Sequence[int]) -> int:
        """How many of the first blocks of a prompt the worker caches, in whatever tier."""
        table = self._tables.get(worker_id)
        if table is None:
            return 0
        for count, block_hash in enumerate(hashes):
            if block_hash not in table.blocks:
                return count
        return len(hashes)

    def match_pool(self, worker_id: str, hashes: Sequence[int]) -> int:
        """How many of the first blocks of a prompt the worker has in its pool, with nothing to be brought back."""
        table = self._tables.get(worker_id)
        if table is None:
            return 0
        for count, block_hash in enumerate(hashes):
            if table.blocks.get(block_hash) is not Tier.POOL:
                return count
        return len(hashes)

    def touch(self, worker_id: str, hashes: Sequence[int]) -> None:
        """A request with these cached blocks went to the worker: keep them longest."""
        table = self._tables.get(worker_id)
        if table is not None:
            table.refresh([block_hash for block_hash in hashes if block_hash in table.blocks])

    def _evict(self) -> None:
        while self._num_blocks > self._max_blocks:
            largest = max(self._tables.values(), key=lambda table: len(table.blocks))
            excess = min(
                self._num_blocks - self._max_blocks, len(largest.blocks) - self._max_blocks // len(self._tables)
            )
            for block_hash in list(largest.blocks)[: max(1, excess)]:
                del largest.blocks[block_hash]
                self._num_blocks -= 1
                self.num_evicted += 1
