"""ActorStore: a MemoryStore that lives in an actor, reached over Ray; used when there is no Redis.

When the actor dies its memory dies with it. Ray starts it again, its store has a new epoch, and every member registers again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.exceptions import RayError

from cluster.store.memory import MemoryStore
from cluster.store.store import SETTLE_S, Changes, Entry, Mirror, Snapshot, StoreUnavailable, check_entry
from router.tenants.buckets import Ask, Given

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

    async def ask(self, asks: Sequence[Ask]) -> tuple[Given, ...]:
        return await self._store.ask(asks)

    async def next_changes(self, prefix: str, epoch: str, revision: int, hold_s: float) -> Changes | None:
        """What has changed under the prefix after `revision`, as soon as something has; None when nothing does for `hold_s`."""
        try:
            async with asyncio.timeout(hold_s):
                return await self._store.next_changes(prefix, epoch, revision)
        except TimeoutError:
            return None


WATCH_HOLD_S = 30.0
"""The host answers a watch at the next change, or after this long to show that it lives."""


class ActorStore:
    """A thin client: every method is one call of the same name on the host."""

    def __init__(self, host: Any, timeout_s: float = 5.0) -> None:
        self._host = host
        self._timeout_s = timeout_s

    async def get(self, key: str) -> Entry | None:
        check_entry(key)
        entry: Entry | None = await self._call("get", key)
        return entry

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> int:
        check_entry(key, value, ttl_s)
        return int(await self._call("put", key, value, ttl_s))

    async def compare_and_set(self, key: str, version: int, value: str, ttl_s: float | None = None) -> int | None:
        check_entry(key, value, ttl_s)
        written: int | None = await self._call("compare_and_set", key, version, value, ttl_s)
        return written

    async def renew(self, key: str, version: int, ttl_s: float) -> bool:
        check_entry(key, ttl_s=ttl_s)
        return bool(await self._call("renew", key, version, ttl_s))

    async def delete(self, key: str, version: int | None = None) -> bool:
        check_entry(key)
        return bool(await self._call("delete", key, version))

    async def list(self, prefix: str) -> Snapshot:
        snapshot: Snapshot = await self._call("list", prefix)
        return snapshot

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot, None]:
        mirror = Mirror()
        while True:
            try:
                changes: Changes | None = await self._call(
                    "next_changes", prefix, mirror.epoch, mirror.revision, WATCH_HOLD_S
                )
            except StoreUnavailable:
                await asyncio.sleep(0.5)
                continue
            if changes is not None and mirror.apply(changes):
                yield mirror.snapshot
                await asyncio.sleep(SETTLE_S)

    async def ask(self, asks: Sequence[Ask]) -> tuple[Given, ...]:
        given: tuple[Given, ...] = await self._call("ask", tuple(asks))
        return given

    async def close(self) -> None:
        """The host keeps the store: others use it."""

    async def _call(self, method: str, *arguments: Any) -> Any:
        timeout_s = self._timeout_s + (WATCH_HOLD_S if method == "next_changes" else 0.0)
        try:
            return await asyncio.wait_for(getattr(self._host, method).remote(*arguments), timeout_s)
        except TimeoutError as error:
            raise StoreUnavailable(f"the store did not answer {method} within {timeout_s:g} s") from error
        except RayError as error:
            raise StoreUnavailable(f"the store is not there: {error}") from error
