"""The list of the cluster's routers: who is on it, when one leaves it, and what is no word of a router."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from cluster.membership.routers import ROUTERS, decode, encode, follow_routers, keep_listed
from cluster.store.memory import MemoryStore
from cluster.store.store import Entry
from router.backend import ListedRouter

FIRST = ListedRouter("router-0", "http://127.0.0.1:8000", "host-a", "0.1", 1.5)
SECOND = ListedRouter("router-1", "http://[::1]:8001", "host-b", "0.2", 2.0)


async def test_routers_see_each_other_until_one_stops_or_its_lease_ends() -> None:
    store = MemoryStore()
    await store.put(f"{ROUTERS}stranger", "http://127.0.0.1:1")
    first = asyncio.create_task(keep_listed(store, FIRST, 30.0))
    async with asyncio.timeout(30), aclosing(follow_routers(store)) as changes:
        async for routers in changes:
            if routers:
                break
        assert routers == (FIRST,)
        second = asyncio.create_task(keep_listed(store, SECOND, 0.3))
        async for routers in changes:
            if len(routers) == 2:
                break
        assert routers == (FIRST, SECOND)
        second.cancel()
        async for routers in changes:
            if len(routers) == 1:
                break
        assert routers == (FIRST,)
    first.cancel()


GOOD = '"url": "u", "host": "h", "version": "v", "started_s": '


@pytest.mark.parametrize(
    "value",
    ["", "[]", "{}", "http://127.0.0.1:8000", "{" + GOOD + '"1"}', "{" + GOOD + "-1}", "{" + GOOD + "true}", "{" + GOOD + "NaN}", "{" + GOOD + "1e999}",
     '{"url": 1, "host": "h", "version": "v", "started_s": 1}', "[" * 900, '{"url": "' + "u" * 2000 + '"}'],
)  # fmt: skip
def test_what_is_no_word_of_a_router_is_left_out(value: str) -> None:
    assert decode(Entry(f"{ROUTERS}x", value, 1)) is None
    assert decode(Entry(f"{ROUTERS}router-1", encode(SECOND), 1)) == SECOND
