"""Routers of the cluster: each keeps a lease in the store that says where it listens, and shows the others to operators."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from cluster.store.store import Entry, Store, StoreUnavailable
from router.backend import ListedRouter

ROUTERS = "routers/"
MAX_ROUTERS = 256
"""That a router shows."""
GATHER_S = 1.0
"""A watcher looks no more often."""
MAX_RECORD_CHARACTERS = 1024


async def keep_listed(store: Store, router: ListedRouter, ttl_s: float) -> None:
    """Until cancelled; the lease ends by itself afterwards."""
    version = 0
    while True:
        with suppress(StoreUnavailable):
            if not await store.renew(ROUTERS + router.router_id, version, ttl_s):
                version = await store.put(ROUTERS + router.router_id, encode(router), ttl_s)
        await asyncio.sleep(ttl_s / 3)


async def follow_routers(store: Store) -> AsyncGenerator[tuple[ListedRouter, ...], None]:
    """All routers, by name, at most MAX_ROUTERS: now, and after changes. Never ends itself."""
    async with aclosing(store.watch(ROUTERS)) as snapshots:
        async for snapshot in snapshots:
            found = (decode(entry) for entry in snapshot.entries)
            yield tuple(router for router in found if router is not None)[:MAX_ROUTERS]
            await asyncio.sleep(GATHER_S)


def encode(router: ListedRouter) -> str:
    return json.dumps(
        {"url": router.url, "host": router.host, "version": router.version, "started_s": router.started_s}
    )


def decode(entry: Entry) -> ListedRouter | None:
    """None when it is no word of a router."""
    try:
        record = json.loads(entry.value) if len(entry.value) <= MAX_RECORD_CHARACTERS else {}
        url, host, version, started_s = (record[name] for name in ("url", "host", "version", "started_s"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(text, str) for text in (url, host, version)):
        return None
    if type(started_s) not in (int, float) or not 0 <= started_s < 2**53:
        return None
    return ListedRouter(entry.key.removeprefix(ROUTERS), url, host, version, float(started_s))
