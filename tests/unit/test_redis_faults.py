"""A Redis that is restarted, fails over, is slow or is full: no tenant's request fails, the log says what is less than it was, and it is over when Redis is well."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import redis
from redis_server import RedisServer
from slow_lane import SlowLane

from cluster.store.redis_store import RedisStore
from cluster.tenants.driver import TenantsDriver
from router.tenants import tenancy as tenancy_module
from router.tenants.config import TenantLimits, TenantsConfig
from router.tenants.rations import Kind
from router.tenants.roster import Key
from router.tenants.tenancy import Caller, Tenancy

BOUND_S = 60.0
COSTS = {Kind.REQUESTS: 1.0, Kind.INPUT: 0.0, Kind.OUTPUT: 0.0}
CALLER = Caller("acme", TenantLimits(requests_per_min=6000, max_concurrent=50))


class Cluster:
    """Three routers whose store is one Redis behind a lane, and a second Redis that copies it."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second = RedisServer(folder), RedisServer(folder)
        self.lane = SlowLane(self.first.port)

    async def start(self) -> None:
        self.first.start()
        self.second.start()
        self.tell(self.second, "REPLICAOF", "127.0.0.1", str(self.first.port))
        port = await self.lane.start()
        cluster = uuid.uuid4().hex
        self.stores = [RedisStore(f"redis://127.0.0.1:{port}/0", cluster, timeout_s=10.0) for _ in range(3)]
        config = TenantsConfig(enabled=True)
        desks = [TenantsDriver(config, store) for store in self.stores]
        self.tenancies = [Tenancy(config, (), f"router-{at}", b"s", desk) for at, desk in enumerate(desks)]

    async def close(self) -> None:
        for tenancy in self.tenancies:
            await tenancy.close()
        for store in self.stores:
            await store.close()
        await self.lane.close()
        self.first.stop()
        self.second.stop()

    @staticmethod
    def tell(server: RedisServer, *words: str) -> None:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command(*words)

    @staticmethod
    def answer(server: RedisServer, section: str, name: str) -> object:
        with redis.Redis.from_url(server.url) as client:
            return client.info(section)[name]  # type: ignore[index]

    # ---- what happens to Redis, and its end ----

    async def restart(self) -> None:
        self.first.stop()

    async def restarted(self) -> None:
        self.first.start()

    async def slow_down(self) -> None:
        self.lane.delay_s = 5.0

    async def speed_up(self) -> None:
        self.lane.delay_s = 0.0

    async def fill(self) -> None:
        """It takes no writes: what it has fills it."""
        self.tell(self.first, "CONFIG", "SET", "maxmemory-policy", "noeviction")
        self.tell(self.first, "CONFIG", "SET", "maxmemory", "1")

    async def empty(self) -> None:
        self.tell(self.first, "CONFIG", "SET", "maxmemory", "0")

    async def kill_primary(self) -> None:
        async with asyncio.timeout(BOUND_S):
            while self.answer(self.second, "replication", "master_link_status") != "up":
                await asyncio.sleep(0.05)
        self.first.stop()

    async def promote_replica(self) -> None:
        self.tell(self.second, "REPLICAOF", "NO", "ONE")
        self.lane.turn(self.second.port)


Fault = Callable[[Cluster], Awaitable[None]]
FAULTS: dict[str, tuple[Fault, Fault]] = {
    "restarted": (Cluster.restart, Cluster.restarted),
    "slow": (Cluster.slow_down, Cluster.speed_up),
    "full": (Cluster.fill, Cluster.empty),
    "fails over": (Cluster.kill_primary, Cluster.promote_replica),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_request_fails_with_redis_and_limits_are_common_again_when_it_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    monkeypatch.setattr(tenancy_module, "ALONE_S", 0.2)
    monkeypatch.setattr(tenancy_module, "ASK_TIMEOUT_S", 2.0)
    caplog.set_level(logging.WARNING, "router.tenants.tenancy")
    cluster = Cluster(tmp_path)
    await cluster.start()
    begin, end = FAULTS[fault]

    async def ask_until(are_alone: bool) -> None:
        """Requests at each router, far below the limits; each passes, until every router is as said."""
        async with asyncio.timeout(BOUND_S):
            while True:
                for tenancy in cluster.tenancies:
                    for _ in range(2):
                        await tenancy.admit(CALLER, COSTS)  # raises Limited
                    for _ in range(2):
                        tenancy.end(CALLER, {})
                if all(tenancy.is_alone is are_alone for tenancy in cluster.tenancies):
                    return
                await asyncio.sleep(0.05)

    try:
        await ask_until(False)
        assert not caplog.records
        lease = await cluster.stores[0].put("workers/decode-0", "here", ttl_s=BOUND_S)
        await begin(cluster)
        await ask_until(True)
        told = [record.message for record in caplog.records]
        assert len(told) == 3 and all("grants tenants' allowances by itself" in each for each in told), "once each"
        if fault == "full":
            assert await cluster.stores[0].renew("workers/decode-0", lease, BOUND_S), "no worker goes away by that"
        await end(cluster)
        await ask_until(False)
        assert sum("common to all routers" in record.message for record in caplog.records) == 3
        key = Key("k", "acme", hashlib.sha256(b"k").digest(), is_stored=True)
        await cluster.tenancies[0].put_key(key)
        assert [entry.key for entry in (await cluster.stores[1].list("keys/")).entries] == ["keys/k"]
    finally:
        await cluster.close()
