"""Real workers and real gRPC: streams break, routers die, and what they asked for is taken up without a changed token."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from builders import generate_alone, make_request
from running_workers import CONFIG, Attached, idle, running, tokens
from stream_reader import Reader

from router.config import RouterConfig
from router.driver import RouterDriver
from workers.errors import Refusal
from workers.request import Request
from workers.status import Role
from workers.wire.attach import Adopt, Submit


def long_request(name: str = "r#1") -> Request:
    return make_request(range(5, 205), 1500, request_id=name, temperature=1.0, seed=3)


async def started(router: Attached, num_tokens: int) -> None:
    """Its request "r" runs, and the router has so many tokens of it."""
    await router.send(Submit(long_request(), router.address.generation, name="r"))
    await router.until(lambda: len(tokens(router.outputs)) >= num_tokens)


async def test_another_router_takes_up_what_a_dead_one_left() -> None:
    async with running("mixed-0", Role.MIXED) as (worker, address):
        dead = await Attached(address).start()
        await started(dead, 20)
        await dead.close()
        had = tokens(dead.outputs)[:15]  # the client was a little behind
        other = await Attached(address).start()
        await other.send(Adopt("r", "x", len(had)))
        outputs = await other.finish("x")
        assert had + tokens(outputs) == generate_alone(long_request(), 64, max_model_len=4096)
        assert outputs[0].position == len(had)
        assert (await idle(worker))["requests_adopted"] == 1
        await other.close()


async def test_what_nobody_takes_up_is_freed_after_the_grace() -> None:
    config = replace(CONFIG, orphan_grace_s=0.05)
    async with running("mixed-0", Role.MIXED, config) as (_, address):
        dead = await Attached(address).start()
        for index in range(8):  # none of these could end by itself in so short a time
            await dead.submit(make_request([index + 5] * 400, 3600, request_id=f"r{index}"))
        await dead.until(lambda: bool(dead.outputs))
        await dead.close()
        other = await Attached(address).start()
        counters = dict((await other.idle()).counters)
        assert counters["orphans_given_up"] >= 1
        await other.send(Adopt("r0", "x", 0))
        assert (await other.finish("x"))[-1].refusal is Refusal.NOT_KEPT
        await other.close()


async def routed(driver: RouterDriver, break_after: int) -> list[int]:
    """The tokens of a request whose worker's stream breaks in the middle."""
    stream, got = driver.submit(long_request("r")), []
    is_broken = False
    async for output in Reader(stream):
        got += output.token_ids
        if len(got) >= break_after and not is_broken:
            is_broken = True
            for link in driver._links.values():
                link._call.cancel()  # type: ignore[attr-defined]
    return got


async def test_a_router_goes_on_with_its_own_requests_when_its_stream_broke() -> None:
    async with running("mixed-0", Role.MIXED) as (worker, address):
        driver = RouterDriver(RouterConfig(model="fake"), "router-0")
        await driver.start()
        driver.set_workers([address])
        async with asyncio.timeout(60):
            while not driver.is_ready():
                await asyncio.sleep(0.01)
            assert await routed(driver, 30) == generate_alone(long_request(), 64, max_model_len=4096)
        counters = await idle(worker)
        assert counters["requests_adopted"] == 1 and counters["requests_orphaned"] == 1
        await driver.stop()


async def test_a_router_that_stops_leaves_nothing_running() -> None:
    async with running("mixed-0", Role.MIXED) as (worker, address):
        driver = RouterDriver(RouterConfig(model="fake"), "router-0")
        await driver.start()
        driver.set_workers([address])
        async with asyncio.timeout(60):
            while not driver.is_ready():
                await asyncio.sleep(0.01)
            requests = [make_request([index + 5] * 400, 3600, request_id=f"r{index}") for index in range(8)]
            streams = [driver.submit(request) for request in requests]
            await anext(Reader(streams[0]))
            await driver.stop()
            counters = await idle(worker)
        assert not counters.get("requests_orphaned") and not counters.get("orphans_given_up")
