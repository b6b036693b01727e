"""Limits of tenants hold for all routers together, and cost hardly a round trip: two and four simulated routers, and routers on a real Redis."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence

import pytest
from redis_server import RedisServer

from cluster.store.redis_store import RedisStore
from cluster.store.store import StoreUnavailable
from router.tenants.buckets import Ask, Buckets, Given
from router.tenants.config import TenantLimits, TenantsConfig
from router.tenants.rations import HOLD_S, MIN_PAUSE_S, Kind, Rations
from router.tenants.tenancy import ASK_TIMEOUT_S, Caller, Limited, Tenancy

COSTS = {Kind.REQUESTS: 1.0, Kind.INPUT: 100.0, Kind.OUTPUT: 0.0}


class Routers:
    """Some, that share buckets; a call for more takes no time, and time moves only where a test says so."""

    def __init__(self, count: int) -> None:
        self.rations = [Rations(f"router-{at}", 1.0, 0.05) for at in range(count)]
        self.buckets = Buckets()
        self.num_calls = 0
        self.now = 1000.0

    def cycle(self, rations: Rations) -> None:
        asks = rations.asks(self.now)
        if asks:
            self.num_calls += 1
            rations.given(asks, self.buckets.ask(asks, self.now), self.now)

    def admit(self, at: int, limits: TenantLimits, costs: dict[Kind, float] = COSTS) -> bool:
        rations = self.rations[at]
        shortage = rations.admit("t", limits, costs, self.now)
        if shortage is not None and shortage.wait_s == 0:
            self.cycle(rations)
            shortage = rations.admit("t", limits, costs, self.now, is_last=True)
        return shortage is None

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            for rations in self.rations:
                self.cycle(rations)


@pytest.mark.parametrize("num_routers", [2, 4])
@pytest.mark.parametrize("skew", [1, 20])
def test_routers_together_admit_what_the_limit_says(num_routers: int, skew: int) -> None:
    """`skew`: how much busier the first router is than the others."""
    routers, limits = Routers(num_routers), TenantLimits(requests_per_min=600, input_tokens_per_min=1_000_000)
    rng, admitted, asked = random.Random(5), 0, 0
    weights = [skew] + [1] * (num_routers - 1)
    for step in range(180 * 50):
        routers.now += 0.02
        if step % 25 == 0:
            for rations in routers.rations:
                routers.cycle(rations)
        asked += 1
        admitted += routers.admit(rng.choices(range(num_routers), weights)[0], limits)
    allowed = 600 + 3 * 600  # what was there at first, and three minutes
    assert asked > 3 * allowed
    assert 0.95 * allowed <= admitted <= allowed, admitted
    assert routers.num_calls <= num_routers * 180 * (2 + 1 / MIN_PAUSE_S), "however many requests there are"


def test_far_below_the_limit_hardly_anything_is_asked() -> None:
    routers, limits = Routers(2), TenantLimits(requests_per_min=60_000, input_tokens_per_min=60_000_000)
    for step in range(5000):
        routers.now += 0.01
        if step % 50 == 0:
            for rations in routers.rations:
                routers.cycle(rations)
        assert routers.admit(step % 2, limits)
    assert routers.num_calls <= 2 * 5000 / 50 + 20


def test_what_a_router_does_not_use_is_there_for_the_others() -> None:
    routers, limits = Routers(2), TenantLimits(requests_per_min=100)
    assert sum(routers.admit(0, limits) for _ in range(50)) == 50
    routers.pass_time(5.0)
    assert sum(routers.admit(1, limits) for _ in range(100)) >= 50 + 5
    assert len(routers.rations[0]) == 1
    routers.pass_time(15.0)
    assert len(routers.rations[0]) == 0, "it is forgotten"


def test_answers_that_were_longer_than_expected_are_paid_for_later() -> None:
    routers, limits = Routers(1), TenantLimits(output_tokens_per_min=6000)
    costs = {Kind.REQUESTS: 1.0, Kind.INPUT: 1.0, Kind.OUTPUT: 200.0}
    generated = 0
    for _ in range(6000):
        routers.now += 0.1
        routers.cycle(routers.rations[0])
        if routers.admit(0, limits, costs):
            routers.rations[0].end("t", limits, {Kind.OUTPUT: 800.0}, routers.now)  # 1,000 in place of 200
            generated += 1000
    assert generated <= 1.05 * (6000 + 10 * 6000)
    assert generated >= 0.95 * 10 * 6000


def test_places_are_shared_and_come_back_from_a_router_that_is_gone() -> None:
    routers, limits = Routers(2), TenantLimits(max_concurrent=10)
    assert sum(routers.admit(at % 2, limits) for at in range(30)) == 10
    for _ in range(3):
        routers.rations[0].end("t", limits, {}, routers.now)
    routers.pass_time(2.0)
    assert sum(routers.admit(1, limits) for _ in range(10)) == 3
    gone = routers.rations.pop(0)
    routers.pass_time(HOLD_S + 1)
    assert sum(routers.admit(0, limits) for _ in range(10)) == 10 - 5 - 3
    assert gone is not routers.rations[0]


def test_what_never_can_be_admitted_and_what_can_later_are_told_apart() -> None:
    rations, limits = Rations("r", 1.0, 0.05), TenantLimits(input_tokens_per_min=600)
    too_large = rations.admit("t", limits, COSTS | {Kind.INPUT: 601.0}, 0.0)
    assert too_large is not None and too_large.wait_s is None and too_large.kind is Kind.INPUT
    buckets, now = Buckets(), 0.0
    assert rations.admit("t", limits, COSTS | {Kind.INPUT: 600.0}, now) is not None
    asks = rations.asks(now)
    rations.given(asks, buckets.ask(asks, now), now)
    assert rations.admit("t", limits, COSTS | {Kind.INPUT: 600.0}, now, is_last=True) is None
    later = rations.admit("t", limits, COSTS | {Kind.INPUT: 300.0}, now, is_last=True)
    assert later is not None and later.wait_s == pytest.approx(30.0)
    (reading,) = rations.readings("t", limits, 6.0)
    assert (reading.limit, reading.remaining, reading.reset_s) == (600, 60, pytest.approx(54.0))


@pytest.mark.parametrize("limits", [TenantLimits(max_concurrent=10), TenantLimits(requests_per_min=100)])
def test_who_comes_while_a_call_runs_is_asked_for_by_the_next(limits: TenantLimits) -> None:
    rations, buckets = Rations("r", 1.0, 0.01), Buckets()

    def admit(is_last: bool) -> bool:
        return rations.admit("t", limits, COSTS, 0.0, is_last) is None

    assert not admit(False)
    running = rations.asks(0.0)
    assert not admit(False), "it comes when the call has begun"
    rations.given(running, buckets.ask(running, 0.0), 0.0)
    assert admit(True)
    asks = rations.asks(0.0)
    rations.given(asks, buckets.ask(asks, 0.0), 0.0)
    assert admit(True)


def test_a_request_that_ends_does_not_bring_its_old_limits_back() -> None:
    routers, old, new = (
        Routers(1),
        TenantLimits(requests_per_min=50),
        TenantLimits(requests_per_min=50, max_concurrent=2),
    )
    assert routers.admit(0, old)
    assert routers.admit(0, new) and routers.admit(0, new)
    routers.rations[0].end("t", old, {}, routers.now)
    assert routers.admit(0, new) and not routers.admit(0, new), "places were not forgotten"


def test_a_limit_that_is_raised_counts_at_once() -> None:
    routers, limits = Routers(1), TenantLimits(requests_per_min=5)
    assert sum(routers.admit(0, limits) for _ in range(20)) == 5
    routers.pass_time(3.0)
    routers.now += 1.0
    assert all(routers.admit(0, TenantLimits(requests_per_min=6000)) for _ in range(90)), "a hundred a second"


# ---- routers on one Redis ----


class StoreDesk:
    """As the cluster's, on this loop."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self.num_calls = 0
        self.is_down = False

    async def ask(self, asks: Sequence[Ask]) -> Sequence[Given]:
        self.num_calls += 1
        if self.is_down:
            raise StoreUnavailable("not here")
        return await self._store.ask(asks)

    async def put_key(self, key: object) -> None:
        raise AssertionError


def test_the_place_of_a_request_that_waits_for_the_next_call_is_not_given_back_with_it() -> None:
    buckets, rations = Buckets(), Rations("r", 1.0, 0.05)
    limits, many = TenantLimits(requests_per_min=600, max_concurrent=50), COSTS | {Kind.REQUESTS: 100.0}

    def call(now: float) -> None:
        asks = rations.asks(now)
        rations.given(asks, buckets.ask(asks, now), now)

    first = rations.admit("acme", limits, COSTS, 0.0)
    assert first is not None and first.wait_s == 0
    call(0.0)
    assert rations.admit("acme", limits, COSTS, 0.0, is_last=True) is None
    call(0.5)
    rations.end("acme", limits, {}, 0.6)
    short = rations.admit("acme", limits, many, 1.4)
    assert short is not None and (short.kind, short.wait_s) == (Kind.REQUESTS, 0)
    call(1.55)
    assert rations.admit("acme", limits, many, 1.55, is_last=True) is None

    rations.end("acme", limits, {}, 1.6)
    running = rations.asks(6.0)  # gives all places back, slowly
    short = rations.admit("acme", limits, many, 6.0)
    assert short is not None and (short.kind, short.wait_s) == (Kind.REQUESTS, 0)
    answered = 6.0 + ASK_TIMEOUT_S + 0.1
    rations.given(running, buckets.ask(running, answered), answered)
    call(answered)
    assert rations.admit("acme", limits, many, answered, is_last=True) is None


async def test_four_routers_on_a_real_redis_hold_a_limit_and_go_on_without_it(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, uuid.uuid4().hex)
    desk = StoreDesk(store)
    limits = TenantLimits(requests_per_min=240, max_concurrent=100_000)
    caller = Caller("acme", limits)
    tenancies = [Tenancy(TenantsConfig(enabled=True), (), f"router-{at}", b"s", desk) for at in range(4)]
    loop = asyncio.get_running_loop()

    async def hammer(tenancy: Tenancy, tries: int) -> int:
        admitted = 0
        for _ in range(tries):
            try:
                await tenancy.admit(caller, COSTS)
            except Limited:
                await asyncio.sleep(0)
            else:
                admitted += 1
        return admitted

    begun_s = loop.time()
    admitted = sum(await asyncio.gather(*(hammer(tenancy, 500) for tenancy in tenancies)))
    passed_s = loop.time() - begun_s
    assert 240 * 0.95 <= admitted <= 240 + 4 * passed_s + 1
    assert desk.num_calls < 1000
    readings = {reading.kind: reading for reading in tenancies[0].readings(caller)}
    assert readings[Kind.REQUESTS].remaining <= 12 + 4 * passed_s

    desk.is_down = True
    lone = Tenancy(TenantsConfig(enabled=True), (), "router-9", b"s", desk)
    assert await hammer(lone, 300) >= 240, "a store that does not answer stops nobody: the router counts by itself"
    for tenancy in (*tenancies, lone):
        await tenancy.close()
    await store.close()
