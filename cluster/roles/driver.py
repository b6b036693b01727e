"""Runs the core of the role controllers on asyncio: between the store, this process's router and its workers. Decides nothing.

Everything here runs on one event loop, that of the store's client; the router has one of its own, and is asked across.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, assert_never

from cluster.roles import events
from cluster.roles.config import RolesConfig
from cluster.roles.core import RolesCore
from cluster.roles.orders import ORDER_S
from cluster.roles.outlook import RoleTargets
from cluster.roles.planner import Planner, RoleController
from cluster.roles.records import CONTROL
from cluster.roles.report import report_of
from cluster.store.store import Store, StoreUnavailable
from router.config import RouterConfig
from router.roles import Order
from workers.errors import BatonError, InvalidRequest, Refusal, Refused

if TYPE_CHECKING:
    from router.server import RouterServer

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Between two looks at the router."""
BUSY_LOOK_S = 0.02
"""The same while switches are under way here."""
REPORT_S = 1.0
MAX_TASKS = 1024
"""Calls of the store and of workers that are under way; further ones are not made, and are due again when they do not show."""


class RolesDriver:
    """`start` before orders come; `run` until it is cancelled. A RoleDesk."""

    def __init__(
        self,
        config: RolesConfig,
        router: RouterConfig,
        name: str,
        lease_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` and `router`: of the router in whose process it runs."""
        self._clock = clock
        self._since_1970_s = time.time() - clock()
        targets = RoleTargets(router.ttft_target_s or config.ttft_slo_s, router.tpot_target_s or config.tpot_slo_s)

        def make_planner() -> Planner:
            return RoleController(config, targets, router.max_local_prefill_tokens)

        self._core = RolesCore(config, name, make_planner, lease_ttl_s, self._wall_s)
        self._name = name
        self._names = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._store: Store | None = None
        self._router: RouterServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: dict[str, asyncio.Future[str]] = {}
        self._look_now = asyncio.Event()

    def _wall_s(self, now: float) -> float:
        return self._since_1970_s + now

    # ---- the router's part ----

    async def carry_out(self, order: Order) -> None:
        """As RoleDesk; from the router's loop."""
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._order(order), self._loop))

    async def _order(self, order: Order) -> None:
        name = f"{self._name}-order-{self._wall_s(self._clock()):.3f}-{next(self._names)}"
        answer = self._answers[name] = self._loop.create_future()
        try:
            self._handle(events.Ordered(name, order))
            self._look_now.set()
            async with asyncio.timeout(2 * ORDER_S):
                error = await answer
        except TimeoutError:
            error = "no role controller has carried it out in time; see `baton roles`"
        finally:
            self._answers.pop(name, None)
        if error.startswith(("no worker could", "worker ")):
            raise InvalidRequest(error, "worker_id")
        if error:
            raise Refused(Refusal.DEADLINE_EXCEEDED, error)

    # ---- life ----

    async def run(self, store: Store, router: RouterServer) -> None:
        """Until cancelled."""
        self._store, self._router = store, router
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(store))
                tasks.create_task(self._look(router))
        finally:
            for task in self._tasks:
                task.cancel()

    async def resign(self) -> None:
        """Lets another router lead at once."""
        for command in self._core.handle(events.Resign(), self._clock()):
            if isinstance(command, events.Remove) and self._store is not None:
                with suppress(StoreUnavailable):
                    await self._store.delete(command.key, command.version)

    async def _watch(self, store: Store) -> None:
        async with aclosing(store.watch(CONTROL)) as snapshots:
            async for snapshot in snapshots:
                self._handle(events.StoreSeen(snapshot))

    async def _look(self, router: RouterServer) -> None:
        reported_s = float("-inf")
        while True:
            try:
                workers, demand, handoff_s = await router.ask(lambda driver: driver.look())
                self._handle(events.Looked(workers, demand, handoff_s))
                now = self._clock()
                if now >= reported_s + REPORT_S:
                    reported_s = now
                    await self._report(router, now)
            except Refused:  # the router stops, or has not begun
                self._handle(events.Tick())
            except Exception:
                log.exception("roles could not be looked at")
            is_busy = bool(self._core.execution.running) and self._core.leads(self._clock())
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_LOOK_S if is_busy else LOOK_S):
                    await self._look_now.wait()
            self._look_now.clear()

    async def _report(self, router: RouterServer, now: float) -> None:
        report = report_of(self._core, now, self._wall_s(now))
        await router.ask(lambda driver: driver.show_roles(report))

    # ---- the loop around the core ----

    def _handle(self, event: events.Event) -> None:
        for command in self._core.handle(event, self._clock()):
            self._execute(command)

    def _execute(self, command: events.Command) -> None:
        match command:
            case events.Write() | events.Renew() | events.Put() | events.Remove():
                self._begin(self._ask_store(command))
            case events.SetRole() | events.SetDraining():
                self._begin(self._tell(command))
            case events.Answer(name, error):
                answer = self._answers.get(name)
                if answer is not None and not answer.done():
                    answer.set_result(error)
            case events.Say(text):
                log.info("%s", text)
            case _:
                assert_never(command)

    def _begin(self, job: Coroutine[Any, Any, None]) -> None:
        if len(self._tasks) >= MAX_TASKS:
            job.close()
            return
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask_store(self, command: events.Write | events.Renew | events.Put | events.Remove) -> None:
        store = self._store
        assert store is not None
        sent_s = self._clock()
        try:
            match command:
                case events.Write(key, version, value, ttl_s):
                    written = await store.compare_and_set(key, version, value, ttl_s)
                    self._handle(events.Wrote(key, value, written))
                case events.Renew(key, version, ttl_s):
                    self._handle(events.Renewed(await store.renew(key, version, ttl_s), sent_s))
                case events.Put(key, value, ttl_s):
                    await store.put(key, value, ttl_s)
                case events.Remove(key, version):
                    await store.delete(key, version or None)
        except (StoreUnavailable, ValueError) as error:
            log.warning("the store does not take %s: %s", command.key, error)
            if isinstance(command, events.Write):
                self._handle(events.Wrote(command.key, command.value, None, failed=True))
            elif isinstance(command, events.Renew):
                self._handle(events.Renewed(False, sent_s, failed=True))

    async def _tell(self, command: events.SetRole | events.SetDraining) -> None:
        """Whether the worker did it shows in what it reports to the router."""
        router = self._router
        assert router is not None
        try:
            match command:
                case events.SetRole(worker_id, role, generation):
                    await router.ask(lambda driver: driver.tell_role(worker_id, role, generation))
                case events.SetDraining(worker_id, is_draining):
                    await router.ask(lambda driver: driver.tell_draining(worker_id, is_draining))
        except BatonError as error:
            log.warning("%s did not do as it was told: %s", command.worker_id, error)
        self._look_now.set()
