"""Role controllers of two routers on one store: orders to either are carried out, and the one that stays goes on alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from roles_story import demand, seen

from cluster.roles.config import RolesConfig
from cluster.roles.driver import RolesDriver
from cluster.roles.fresh import forget_switches
from cluster.roles.records import SWITCHES
from cluster.store.memory import MemoryStore
from router.config import RouterConfig
from router.fleet.seen import WorkerSeen
from router.requests.demand import DemandReport
from router.roles import Order, RolesReport
from workers.errors import InvalidRequest, Refusal, Refused
from workers.status import Role


class OneLoopRouter:
    """In the place of a RouterServer and its driver: workers that do as they are told, on the loop of whoever asks."""

    def __init__(self, workers: dict[str, WorkerSeen]) -> None:
        self.workers = workers
        self.report = RolesReport()

    async def ask(self, question: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        return await question(self)

    async def look(self) -> tuple[tuple[WorkerSeen, ...], DemandReport, float]:
        return tuple(self.workers[name] for name in sorted(self.workers)), demand(0.0), 0.01

    async def tell_role(self, worker_id: str, role: Role, generation: int) -> None:
        worker = self.workers[worker_id]
        if worker.generation != generation:
            raise Refused(Refusal.STALE_GENERATION, "it is in another one")
        self.workers[worker_id] = replace(worker, role=role, generation=generation + 1)

    async def tell_draining(self, worker_id: str, is_draining: bool) -> None:
        self.workers[worker_id] = replace(self.workers[worker_id], is_draining=is_draining, num_sequences=0)

    async def show_roles(self, report: RolesReport) -> None:
        self.report = report


async def test_orders_to_either_router_are_carried_out_and_the_one_that_stays_goes_on_alone() -> None:
    store = MemoryStore()
    names = ("prefill-0", "decode-0", "decode-1")
    workers = {name: seen(name, num_sequences=3 if name == "decode-0" else 0) for name in names}
    routers = [OneLoopRouter(workers), OneLoopRouter(workers)]
    config = RolesConfig(mode="off")
    drivers = [RolesDriver(config, RouterConfig(model="m"), f"router-{at}", lease_ttl_s=1.0) for at in range(2)]
    runs = [asyncio.create_task(d.run(store, r)) for d, r in zip(drivers, routers, strict=True)]  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(
                drivers[0].carry_out(Order("decode-0", Role.PREFILL)),
                drivers[1].carry_out(Order("decode-1", is_pinned=True)),
            )
            assert workers["decode-0"].role is Role.PREFILL and not workers["decode-0"].is_draining
            with pytest.raises(InvalidRequest, match="no worker could decode"):
                await drivers[1].carry_out(Order("decode-1", Role.PREFILL))
            while not any(router.report.leads for router in routers) or not routers[0].report.page.get("audit"):
                await asyncio.sleep(0.01)
            leader = next(at for at, router in enumerate(routers) if router.report.leads)
            follower = routers[1 - leader]  # it hears of what stands in the store a little later
            while [each["worker_id"] for each in follower.report.page["workers"] if each["pinned"]] != ["decode-1"]:
                await asyncio.sleep(0.01)
            runs[leader].cancel()
            await drivers[leader].resign()
            await drivers[1 - leader].carry_out(Order("decode-0", Role.DECODE))
            assert (workers["decode-0"].role, workers["decode-0"].generation) == (Role.DECODE, 3)
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
    await forget_switches(store, "decode-0")
    assert await store.get(SWITCHES + "decode-0") is None
    await store.close()
