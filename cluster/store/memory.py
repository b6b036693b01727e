"""MemoryStore: the store of a cluster on one host, in the memory of one process and on one event loop."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from cluster.store.store import ABSENT, Entry, Snapshot, check_entry


@dataclass(slots=True)
class _Slot:
    entry: Entry
    expiry: asyncio.TimerHandle | None


class MemoryStore:
    """Leases end by timers of the event loop; watchers sleep on an event that the next change sets."""

    def __init__(self) -> None:
        self._epoch = uuid.uuid4().hex
        self._revision = 0
        self._slots: dict[str, _Slot] = {}
        self._watchers: dict[asyncio.Event, str] = {}

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
        changed = asyncio.Event()
        self._watchers[changed] = prefix
        try:
            while True:
                yield self._snapshot(prefix)
                await changed.wait()
                changed.clear()
        finally:
            del self._watchers[changed]

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
        self._revision += 1
        expiry = self._expire_after(key, ttl_s) if ttl_s else None
        self._slots[key] = _Slot(Entry(key, value, self._revision), expiry)
        self._announce(key)
        return self._revision

    def _expire_after(self, key: str, ttl_s: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(ttl_s, self._remove, key)

    def _remove(self, key: str) -> None:
        slot = self._slots.pop(key)
        if slot.expiry:
            slot.expiry.cancel()
        self._announce(key)

    def _announce(self, key: str) -> None:
        for changed, prefix in self._watchers.items():
            if key.startswith(prefix):
                changed.set()
