"""Follows the membership in the store: the effect around cluster.membership.membership, the same for routers and for people who watch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from cluster.membership.membership import WORKERS, Membership, Registration, Tick
from cluster.store.store import Store

log = logging.getLogger(__name__)


async def follow_members(
    store: Store, grace_s: float, doubt_s: float = 0.0
) -> AsyncGenerator[tuple[Registration, ...], None]:
    """Yields the members at once, then after each change: of the store, or by a grace period that ends. Never ends itself."""
    membership = Membership(grace_s, doubt_s)
    known: frozenset[str] = frozenset()
    async with aclosing(store.watch(WORKERS)) as snapshots:
        upcoming = asyncio.ensure_future(anext(snapshots))
        try:
            membership.handle(await upcoming, time.monotonic())
            known = _name_refused(membership.refused, known)
            upcoming = asyncio.ensure_future(anext(snapshots))
            yield membership.workers
            while True:
                wait_s = None if membership.deadline is None else max(0.0, membership.deadline - time.monotonic())
                done, _ = await asyncio.wait({upcoming}, timeout=wait_s)
                event = upcoming.result() if done else Tick()
                if done:
                    upcoming = asyncio.ensure_future(anext(snapshots))
                is_changed = membership.handle(event, time.monotonic()) is not None
                known = _name_refused(membership.refused, known)
                if is_changed:
                    yield membership.workers
        finally:
            upcoming.cancel()
            with suppress(asyncio.CancelledError):
                await upcoming


def _name_refused(refused: frozenset[str], known: frozenset[str]) -> frozenset[str]:
    """Logs those that are new; returns what is to be known next time."""
    for key in sorted(refused - known):
        log.warning("the store's entry %.100r is no registration of a worker and does not count", key)
    return refused
