"""The role controller of one simulated router: the product's core with a loop around it in virtual time. Decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol, assert_never

from cluster.sim.core_loop import CoreLoop
from cluster.sim.network import Network
from cluster.sim.product import (
    CONTROL,
    SWITCHES,
    Order,
    Planner,
    RolesConfig,
    RolesCore,
    Snapshot,
    roles_events,
    switch_of,
    workers_seen,
)
from cluster.sim.profiles.profile import Profile
from cluster.sim.registry import SimStore
from cluster.sim.router import SimRouter
from cluster.sim.timeline import Timeline
from cluster.sim.worker import SimWorker

STORE = "store"
"""The store's node, for cuts of the network."""
STORE_TIMEOUT_S = 5.0
"""As cluster.store waits."""
AGAIN_S = 0.5
LOOK_S = 0.02
"""Between two looks at the workers while switches are under way, as cluster.roles.driver has it."""


class World(Protocol):
    """What a role controller finds around it."""

    timeline: Timeline
    network: Network
    store: SimStore
    profile: Profile

    def living_worker(self, worker_id: str) -> SimWorker | None: ...

    def told_role(self, worker: SimWorker, role: str, generation: int) -> None: ...

    def told_draining(self, worker: SimWorker, is_draining: bool) -> None: ...

    def note(self, text: str) -> None: ...


class SimRoles(CoreLoop[roles_events.Event, roles_events.Command]):
    """Of a router from its start to its end."""

    core: RolesCore

    def __init__(
        self,
        world: World,
        router: SimRouter,
        config: RolesConfig,
        make_planner: Callable[[], Planner],
        lease_ttl_s: float,
    ) -> None:
        super().__init__(world.timeline)
        self.world = world
        self._router = router
        self._config = config
        self.core = RolesCore(config, router.name, make_planner, lease_ttl_s, lambda now: now)
        self._names = itertools.count(1)
        self._watcher = f"{router.name}/roles"

    def start(self) -> None:
        self.world.store.watch(self._watcher, self._seen, CONTROL)
        self._look()

    def stop(self) -> None:
        """The router is gone."""
        self.is_dead = True
        self.world.store.unwatch(self._watcher)

    def order(self, order: Order) -> None:
        """An operator wants something."""
        self.handle(roles_events.Ordered(f"{self._router.name}-{next(self._names)}", order))

    def _look(self) -> None:
        if self.is_dead:
            return
        core, now = self._router.core, self.world.timeline.now
        handoff_s = core.forecasts.handoffs.fixed_s
        self.handle(roles_events.Looked(workers_seen(core.fleet), core.flights.demand(now), handoff_s))
        is_busy = self.core.execution.running and self.core.leads(now)
        self.world.timeline.after(LOOK_S if is_busy else min(0.25, self._config.interval_s), self._look)

    def _seen(self, snapshot: Snapshot) -> None:
        if self._reaches_store():
            self.handle(roles_events.StoreSeen(snapshot))
        elif not self.is_dead:  # a watch that is cut off asks again
            self.world.timeline.after(AGAIN_S, self.world.store.watch, self._watcher, self._seen, CONTROL)

    def _reaches_store(self) -> bool:
        return not self.world.store.is_away and not self.world.network.is_cut(self._router.name, STORE)

    # ---- what the core says ----

    def _execute(self, command: roles_events.Command) -> None:
        world = self.world
        match command:
            case roles_events.Write() | roles_events.Put() | roles_events.Renew() | roles_events.Remove():
                world.timeline.after(world.profile.control_latency_s, self._ask_store, command, world.timeline.now)
            case roles_events.SetRole(worker_id, role, generation):
                self._reach(worker_id, lambda worker: world.told_role(worker, role.value, generation))
            case roles_events.SetDraining(worker_id, is_draining):
                self._reach(worker_id, lambda worker: world.told_draining(worker, is_draining))
            case roles_events.Answer(name, error):
                world.note(f"the order {name} {'failed: ' + error if error else 'is carried out'}")
            case roles_events.Say(text):
                world.note(f"roles: {text}")
            case _:
                assert_never(command)

    def _ask_store(self, command: roles_events.Command, sent_s: float) -> None:
        store, latency_s = self.world.store, self.world.profile.control_latency_s
        reaches = self._reaches_store()
        answer: roles_events.Event | None = None
        match command:
            case roles_events.Write(key, version, value, ttl_s):
                written = store.compare_and_set(key, version, value, ttl_s) if reaches else None
                answer = roles_events.Wrote(key, value, written, failed=not reaches)
                if written is not None and key.startswith(SWITCHES) and (switch := switch_of(value)) is not None:
                    because = f": {switch.why}" if switch.why else ""
                    self.world.note(f"roles: {switch.worker_id} to {switch.target} is {switch.phase}{because}")
            case roles_events.Renew(key, version, ttl_s):
                is_kept = reaches and store.prolong(key, version, ttl_s)
                answer = roles_events.Renewed(is_kept, sent_s, failed=not reaches)
            case roles_events.Put(key, value, ttl_s) if reaches:
                store.put(key, value, ttl_s)
            case roles_events.Remove(key, version) if reaches:
                store.remove(key, version)
        if answer is not None:
            self.world.timeline.after(latency_s if reaches else STORE_TIMEOUT_S, self.handle, answer)

    def _reach(self, worker_id: str, tell: Callable[[SimWorker], None]) -> None:
        """What is said to a worker arrives, unless the network is cut or it is dead."""
        if not self.world.network.is_cut(self._router.name, worker_id):
            self.world.timeline.after(self.world.profile.control_latency_s, self._arrive, worker_id, tell)

    def _arrive(self, worker_id: str, tell: Callable[[SimWorker], None]) -> None:
        worker = self.world.living_worker(worker_id)
        if worker is not None:
            tell(worker)
