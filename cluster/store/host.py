"""The actor that hosts the store of a cluster that has no Redis; knows nothing of workers and routers.

When it dies its memory dies with it. Ray starts it again, its store has a new epoch, and every member registers again.
"""

from __future__ import annotations

import asyncio
import os

from cluster.store.memory import MemoryStore
from cluster.store.store import Changes, Entry, Snapshot

STORE_HOST_NAME = "store"


class StoreHost:
    """An async Ray actor; its methods are those of a Store, with `next_changes` in place of `watch`."""

    def __init__(self) -> None:
        self._store = MemoryStore()

    def __repr__(self) -> str:
        return STORE_HOST_NAME

    async def ready(self) -> str:
        """Answers once the actor runs."""
        return STORE_HOST_NAME

    async def pid(self) -> int:
        return os.getpid()

    async def get(self, key: str) -> Entry | None:
        return await self._store.get(key)

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> int:
        return await self._store.put(key, value, ttl_s)

    async def compare_and_set(self, key: str, version: int, value: str, ttl_s: float | None = None) -> int | None:
        return await self._store.compare_and_set(key, version, value, ttl_s)

    async def renew(self, key: str, version: int, ttl_s: float) -> bool:
        return await self._store.renew(key, version, ttl_s)

    async def delete(self, key: str, version: int | None = None) -> bool:
        return await self._store.delete(key, version)

    async def list(self, prefix: str) -> Snapshot:
        return await self._store.list(prefix)

    async def next_changes(self, prefix: str, epoch: str, revision: int, hold_s: float) -> Changes | None:
        """What has changed under the prefix after `revision`, as soon as something has; None when nothing does for `hold_s`."""
        try:
            async with asyncio.timeout(hold_s):
                return await self._store.next_changes(prefix, epoch, revision)
        except TimeoutError:
            return None
