"""The clock of a host, or of Redis, is set an hour back or forward: what waits, counts or ends by it does so within its own time."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import redis
from cryptography import x509
from redis_server import RedisServer

from cluster.identity.authority import Authority
from cluster.roles.switches import Phase, RoleSwitch
from cluster.store.redis_store import RedisStore
from router.tenants.buckets import Buckets, Draw, Hold
from router.tenants.config import TenantsConfig
from router.tenants.roster import Key
from router.tenants.tenancy import Caller, Tenancy
from workers.status import Role
from workers.trust.parties import worker

BOUND_S = 30.0
HOUR_S = 3600.0
DRAW = Draw("t/input", 10.0, 10.0, 1e6)


class Planted:
    """A store, and a client that leaves in its Redis what one has whose clock was an hour ahead until now."""

    def __init__(self, server: RedisServer) -> None:
        self.store = RedisStore(server.url, cluster := uuid.uuid4().hex)
        self.client: redis.Redis[str] = redis.Redis.from_url(server.url)
        self.space = f"baton:{{{cluster}}}:"
        seconds, _ = self.client.time()
        self.later_s = seconds + HOUR_S


@pytest.fixture
async def planted(redis_server: RedisServer) -> AsyncIterator[Planted]:
    planted = Planted(redis_server)
    yield planted
    await planted.store.close()
    planted.client.close()


async def test_a_bucket_fills_on_when_redis_goes_back(planted: Planted) -> None:
    planted.client.hset(f"{planted.space}bucket:{DRAW.name}", mapping={"level": 0, "at": planted.later_s * 1e6})
    async with asyncio.timeout(BOUND_S):
        while not (await planted.store.ask([DRAW]))[0].amount:
            pass


async def test_places_of_an_owner_that_is_gone_are_free_when_redis_goes_back(planted: Planted) -> None:
    planted.client.hset(f"{planted.space}bucket:places", "gone", f"5 {planted.later_s * 1e3:.0f}")
    async with asyncio.timeout(BOUND_S):
        while not (await planted.store.ask([Hold("places", "here", 1, 5, 0.2)]))[0].amount:
            pass


async def test_a_lease_that_nobody_renews_ends_when_redis_goes_back(planted: Planted) -> None:
    await planted.store.put("workers/gone", "x", ttl_s=0.5)
    await planted.store.put("workers/stays", "x")
    planted.client.pexpire(f"{planted.space}entry:workers/gone", int(HOUR_S * 1e3))
    async with asyncio.timeout(BOUND_S), aclosing(planted.store.watch("workers/")) as snapshots:
        async for snapshot in snapshots:
            if [entry.key for entry in snapshot.entries] == ["workers/stays"]:
                return


@pytest.mark.parametrize("jump_s", [-HOUR_S, HOUR_S])
def test_allowances_of_one_host_give_no_more_and_no_less_for_long(jump_s: float) -> None:
    buckets, draw = Buckets(), replace(DRAW, rate_per_s=1.0)
    assert buckets.ask([draw], 5000.0)[0].amount == 10
    at_once = buckets.ask([draw], 5000.0 + jump_s)[0].amount
    assert at_once == (10 if jump_s > 0 else 0), "a bucket that holds no more than it may"
    assert buckets.ask([draw], 5004.0 + jump_s)[0].amount == 4


@pytest.mark.parametrize("jump_s", [-HOUR_S, 0.0, HOUR_S])
def test_a_worker_that_was_switched_rests_no_longer_than_twice_its_time(jump_s: float) -> None:
    """It is written by one router's clock, and read by another's."""
    switch = RoleSwitch("n", "w", Role.DECODE, Role.PREFILL, 1, "", phase=Phase.DONE, at_s=1e9 + jump_s)
    assert switch.rests(1e9 + 1, 60.0) == (jump_s == 0)
    assert switch.rests(1e9 + jump_s + 59, 60.0) and not switch.rests(1e9 + jump_s + 60, 60.0)


def test_a_key_ends_by_the_time_of_day_and_its_allowances_do_not_care() -> None:
    day = 1e9
    tenancy = Tenancy(TenantsConfig(enabled=True), clock=lambda: 1.0, wall=lambda: day)
    tenancy.set_roster({}, (Key("k", "acme", bytes(32), expires_s=1e9 + 60),))
    assert isinstance(tenancy.caller(bytes(32)), Caller)
    day += HOUR_S
    assert isinstance(tenancy.caller(bytes(32)), Key)
    day -= 2 * HOUR_S
    assert isinstance(tenancy.caller(bytes(32)), Caller)


def test_certificates_hold_for_hosts_whose_clocks_are_a_day_behind() -> None:
    made = datetime(2026, 1, 1, tzinfo=UTC)
    authority = Authority.make(30, now=made)
    for pair in (authority.pair, authority.issue((worker("decode-0"),), 30, now=made)):
        cert = x509.load_pem_x509_certificate(pair.cert)
        assert cert.not_valid_before_utc == made - timedelta(days=1)
        assert cert.not_valid_after_utc == made + timedelta(days=30)
