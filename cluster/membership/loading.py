"""Workers that are on their way: while one loads it says in the store how far it has come, under a lease, and routers show it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from cluster.store.store import Entry, Store, StoreUnavailable
from router.backend import LoadingWorker
from workers.status import LoadProgress, Role

LOADING = "loading/"
EVERY_S = 2.0
"""Between two words of a worker; one that has loaded sooner says none."""
LEASE_S = 10.0
GATHER_S = 1.0
"""A watcher looks no more often."""
MAX_RECORD_CHARACTERS = 1024


async def tell_loading(store: Store, worker_id: str, role: Role, read: Callable[[], LoadProgress]) -> None:
    """Until cancelled; then nothing is said any more."""
    try:
        while True:
            await asyncio.sleep(EVERY_S)
            with suppress(StoreUnavailable):
                await store.put(LOADING + worker_id, encode(role, read()), LEASE_S)
    finally:
        with suppress(StoreUnavailable):
            await store.delete(LOADING + worker_id)


async def follow_loading(store: Store) -> AsyncGenerator[tuple[LoadingWorker, ...], None]:
    """All workers that load, by name: now, and after changes. Never ends itself."""
    async with aclosing(store.watch(LOADING)) as snapshots:
        async for snapshot in snapshots:
            found = (decode(entry) for entry in snapshot.entries)
            yield tuple(worker for worker in found if worker is not None)
            await asyncio.sleep(GATHER_S)


def encode(role: Role, progress: LoadProgress) -> str:
    return json.dumps({"role": role.value, "progress": list(progress)})


def decode(entry: Entry) -> LoadingWorker | None:
    """None when it is no word of a worker."""
    try:
        record = json.loads(entry.value) if len(entry.value) <= MAX_RECORD_CHARACTERS else {}
        counts, role = record["progress"], Role(record["role"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(counts, list) or len(counts) != len(LoadProgress._fields):
        return None
    if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
        return None
    return LoadingWorker(entry.key.removeprefix(LOADING), role, LoadProgress(*counts))
