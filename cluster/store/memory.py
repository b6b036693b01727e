"""MemoryStore: the store of a cluster on one host, in the memory of one process and on one event loop."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from cluster.store.store import ABSENT, SETTLE_S, Changes, Entry, Mirror, Snapshot, check_entry
from router.tenants.buckets import Ask, Buckets, Given

MAX_CHANGES = 4096
"""Revisions that are remembered; a watcher that is further behind gets everything."""


@dataclass(slots=True)
class _Slot:
    entry: Entry
    expiry: asyncio.TimerHandle | None


class MemoryStore:
    """Leases end by timers of the event loop; watchers sleep on an event that the next change sets, and hear what is different."""

    def __init__(self) -> None:
        self._epoch = uuid.uuid4().hex
        self._revision = 0
        self._slots: dict[str, _Slot] = {}
        self._buckets = Buckets()
        self._changes: deque[tuple[int, str]] = deque(maxlen=MAX_CHANGES)
        """The last revisions with the key that each one wrote or removed."""
        self._changed = asyncio.Event()
        """Set by the next change, which puts another in its place."""

    async def get(self, key: str) -> Entry | None:
        check_entry(key)
        slot = self._slots.get(key)
        return slot.entry if slot else None

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> int:
        check_entry(key, value, ttl_s)
        return self._write(key, value, ttl_s)

    async def compare_and_set(self, key: str, version: int, value: str, ttl_s: float | None = None) -> int | None:
        check_entry(key, value, ttl_s)
        return self._write(key, value, ttl_s) if self._version(key) == version else None

    async def renew(self, key: str, version: int, ttl_s: float) -> bool:
        check_entry(key, ttl_s=ttl_s)
        if version == ABSENT or self._version(key) != version:
            return False
        slot = self._slots[key]
        if slot.expiry:
            slot.expiry.cancel()
        slot.expiry = self._expire_after(key, ttl_s)
        return True

    async def delete(self, key: str, version: int | None = None) -> bool:
        check_entry(key)
        if key not in self._slots or version not in (None, self._version(key)):
            return False
        self._remove(key)
        return True

    async def list(self, prefix: str) -> Snapshot:
        return self._snapshot(prefix)

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot, None]:
        mirror = Mirror()
        while True:
            if mirror.apply(await self.next_changes(prefix, mirror.epoch, mirror.revision)):
                yield mirror.snapshot
                await asyncio.sleep(SETTLE_S)

    async def next_changes(self, prefix: str, epoch: str, revision: int) -> Changes:
        """What has changed under the prefix after `revision` in the store's life `epoch`; waits until something has."""
        while True:
            oldest = self._changes[0][0] if self._changes else self._revision + 1
            if epoch != self._epoch or revision < oldest - 1:
                return Changes(self._epoch, self._revision, self._snapshot(prefix).entries, is_whole=True)
            keys = {key for number, key in self._newer(revision) if key.startswith(prefix)}
            if keys:
                found = [key for key in sorted(keys) if key in self._slots]
                entries = tuple(self._slots[key].entry for key in found)
                return Changes(self._epoch, self._revision, entries, tuple(sorted(keys.difference(found))))
            revision = self._revision
            changed = self._changed
            await changed.wait()

    def _newer(self, revision: int) -> Iterator[tuple[int, str]]:
        """The changes after a revision, latest first."""
        return itertools.takewhile(lambda change: change[0] > revision, reversed(self._changes))

    async def ask(self, asks: Sequence[Ask]) -> tuple[Given, ...]:
        return self._buckets.ask(asks, asyncio.get_running_loop().time())

    async def close(self) -> None:
        for slot in self._slots.values():
            if slot.expiry:
                slot.expiry.cancel()
        self._slots.clear()

    def _version(self, key: str) -> int:
        slot = self._slots.get(key)
        return slot.entry.version if slot else ABSENT

    def _snapshot(self, prefix: str) -> Snapshot:
        keys = sorted(key for key in self._slots if key.startswith(prefix))
        return Snapshot(self._epoch, tuple(self._slots[key].entry for key in keys))

    def _write(self, key: str, value: str, ttl_s: float | None) -> int:
        old = self._slots.get(key)
        if old and old.expiry:
            old.expiry.cancel()
        expiry = self._expire_after(key, ttl_s) if ttl_s else None
        self._announce(key)
        self._slots[key] = _Slot(Entry(key, value, self._revision), expiry)
        return self._revision

    def _expire_after(self, key: str, ttl_s: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(ttl_s, self._remove, key)

    def _remove(self, key: str) -> None:
        slot = self._slots.pop(key)
        if slot.expiry:
            slot.expiry.cancel()
        self._announce(key)

    def _announce(self, key: str) -> None:
        self._revision += 1
        self._changes.append((self._revision, key))
        self._changed.set()
        self._changed = asyncio.Event()
