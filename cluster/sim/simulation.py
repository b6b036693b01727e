"""Puts a simulation together and runs it: workers, routers, store, network, clients and faults on one timeline."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from cluster.membership.membership import DOUBT_LEASES
from cluster.sim.clients import Clients, Targets
from cluster.sim.fault_injector import FaultInjector
from cluster.sim.faults import Fault
from cluster.sim.invariants import check_idle, check_router, check_worker
from cluster.sim.load import TraceRequest
from cluster.sim.network import Network
from cluster.sim.product import (
    InvariantViolated,
    Output,
    Planner,
    Registration,
    Role,
    RoleController,
    RolesConfig,
    RoleTargets,
    RouterConfig,
    WorkerConfig,
    router_events,
    worker_events,
)
from cluster.sim.record import RouterSample, RunRecord, Switch, WorkerSample
from cluster.sim.registry import Registered, SimStore
from cluster.sim.roles import STORE, SimRoles
from cluster.sim.router import SimRouter
from cluster.sim.settings import Settings
from cluster.sim.timeline import Timeline
from cluster.sim.worker import SimWorker

WARM_UP_S = 1.0
"""Workers register and routers connect before the trace begins."""
QUIET_S = 0.25
"""Before a fault steps are taken one by one, so that what was said before it has arrived."""

MakePlanner = Callable[[RolesConfig, RoleTargets, int], Planner]
"""Settings, targets, and how many tokens of a prompt a DECODE worker may compute itself."""
Notice = Callable[[float, str], None]
"""Hears of what a reader of a transcript wants to know: time and text."""


class Simulation:
    """One run. `notice` hears of faults, losses and switches as they happen."""

    def __init__(
        self,
        settings: Settings,
        trace: Iterable[TraceRequest],
        faults: Iterable[Fault] = (),
        notice: Notice | None = None,
        make_planner: MakePlanner = RoleController,
    ) -> None:
        self._make_planner = make_planner
        self.roles: dict[str, SimRoles] = {}
        """By router."""
        self.settings = settings
        self.profile = settings.profile
        self.timeline = Timeline()
        self.network = Network(self.timeline, self.profile.transfer_bytes_per_s, self.profile.transfer_latency_s)
        self.store = SimStore(self.timeline, settings.lease_ttl_s)
        self.record = RunRecord({}, settings.seed, sample_interval_s=settings.sample_interval_s)
        self.workers: dict[str, SimWorker] = {}
        self.routers: dict[str, SimRouter] = {}
        self._notice = notice or (lambda now, text: None)
        self._faults = sorted(faults, key=lambda fault: fault.at_s)
        self._fault_times = [WARM_UP_S + fault.at_s for fault in self._faults]
        self._injector = FaultInjector(self, settings.seed)
        self._starts: Counter[str] = Counter()
        self._targets: dict[str, SimWorker] = {}
        self._registered: dict[str, Registered] = {}
        self._roles = dict(settings.workers)
        self._generations: dict[tuple[str, int], str] = {}
        self._drained: set[str] = set()
        self._busy: dict[str, float] = {}
        self._num_steps_before = 0
        self._num_unchecked = 0
        self._last_busy_event = 0.0
        self.clients = Clients(
            self.timeline, self, iter(trace), Targets(settings.ttft_s, settings.tpot_s), self.profile
        )
        num_seqs = settings.worker.get("max_num_seqs", self.profile.max_num_seqs)
        self.worker_config = WorkerConfig(
            **{
                "model": self.profile.model,
                "max_num_seqs": num_seqs,
                "max_batch_tokens": max(self.profile.max_batched_tokens, num_seqs),
                "max_model_len": self.profile.max_model_len,
                **settings.worker,
            }
        )
        max_running = max(1024, len(self._roles) * self.worker_config.max_num_seqs)
        self.router_config = RouterConfig(
            **{"model": self.profile.model, "max_running": max_running, **settings.router}
        )

    # ---- the cluster ----

    def _start_all(self) -> None:
        for name, role in self.settings.workers:
            self._start_worker(name, role)
        for name in self.settings.routers:
            self._start_router(name)
        for fault in self._faults:
            self.timeline.at(WARM_UP_S + fault.at_s, self._injector.inflict, fault)
        self.timeline.at(WARM_UP_S, self._sample)
        self.clients.start(WARM_UP_S)

    def _start_worker(self, name: str, role: Role) -> None:
        self._starts[name] += 1
        worker = SimWorker(
            self,
            self.worker_config,
            name,
            role,
            self._starts[name],
            self.settings.num_parts,
            self.settings.max_leap_s,
            self._leap_until,
            self.clients.hang_ups,
        )
        self.workers[name] = self._targets[worker.identity.target] = worker
        self._note_generation(worker)
        if name in self._drained:
            worker.handle(worker_events.SetDrain(True, remember=False))
        worker.start()
        registration = Registration(worker.identity.address, role)
        self._registered[name] = Registered(
            self.store, registration, worker.defer, lambda: not self.network.is_cut(name, STORE), self.timeline
        )

    def _start_router(self, name: str) -> None:
        ttl_s = self.settings.lease_ttl_s
        router = self.routers[name] = SimRouter(self, self.router_config, name, ttl_s, DOUBT_LEASES * ttl_s)
        self.store.watch(name, router.members)
        router.start()
        config, limits = self.settings.roles, self.router_config
        if config is not None:
            targets = RoleTargets(
                limits.ttft_target_s or self.settings.ttft_s or config.ttft_slo_s,
                limits.tpot_target_s or self.settings.tpot_s or config.tpot_slo_s,
            )
            local_tokens = limits.max_local_prefill_tokens
            self.roles[name] = SimRoles(
                self, router, config, lambda: self._make_planner(config, targets, local_tokens), ttl_s
            )
            self.roles[name].start()

    def worker_at(self, target: str) -> SimWorker | None:
        return self._targets.get(target)

    def pick(self, number: int) -> SimRouter | None:
        """A router that is ready, in turn, as a load balancer in front of them would choose."""
        ready = [router for router in self.routers.values() if not router.is_dead and router.core.fleet.can_decode]
        return ready[number % len(ready)] if ready else None

    def _leap_until(self, now: float) -> float:
        """Steps may go together until shortly before the next fault."""
        times, at = self._fault_times, self._injector.num_inflicted
        return times[at] - QUIET_S if at < len(times) else float("inf")

    # ---- what the parts tell ----

    def role_changed(self, worker: SimWorker, role: Role, generation: int) -> None:
        now = self.timeline.now
        self._roles[worker.name] = role
        self._note_generation(worker)
        self.record.switches.append(Switch(now - WARM_UP_S, worker.name, role.value, generation))
        self.note(f"{worker.name} is {role} now")
        self.timeline.soon(self._registered[worker.name].change, Registration(worker.identity.address, role))

    def drain_changed(self, worker: SimWorker, is_draining: bool) -> None:
        (self._drained.add if is_draining else self._drained.discard)(worker.name)

    def _note_generation(self, worker: SimWorker) -> None:
        """A generation has one role."""
        me = worker.identity
        known = self._generations.setdefault((me.worker_id, me.generation), me.role.value)
        if known != me.role.value:
            raise InvariantViolated(f"{me.worker_id} was {known} in generation {me.generation}, and is {me.role}")

    def delivered(self, router: SimRouter, output: Output) -> None:
        self.clients.delivered(router, output)

    def rejected(self, router: SimRouter, rejection: router_events.Reject) -> None:
        self.clients.rejected(rejection.request_id, rejection.refusal.value)

    def note(self, text: str) -> None:
        """For the transcript, in the trace's time."""
        self._notice(self.timeline.now - WARM_UP_S, text)

    def submitted(self, request_name: str) -> None:
        self.clients.submitted(request_name)

    # ---- what faults do ----

    def living_worker(self, worker_id: str) -> SimWorker | None:
        worker = self.workers[worker_id]
        return None if worker.is_dead else worker

    def told_role(self, worker: SimWorker, role: str, generation: int) -> None:
        """A role controller's word has arrived; it holds for one generation."""
        if not worker.defer(self.told_role, worker, role, generation) and generation == worker.identity.generation:
            worker.handle(worker_events.SwitchRole(Role(role)))

    def told_draining(self, worker: SimWorker, is_draining: bool) -> None:
        self.tell(worker, worker_events.SetDrain(is_draining))

    def tell(self, worker: SimWorker, event: worker_events.Event) -> None:
        """Once it does not stand still any more."""
        if not worker.defer(self.tell, worker, event):
            worker.handle(event)

    def kill(self, name: str, restart_s: float | None) -> None:
        """Ends a router or a worker; another process takes its place `restart_s` later, never when that is None."""
        router = self.routers.get(name)
        if router is not None:
            if router.is_dead:
                return
            router.kill()
            self.store.unwatch(name)
            if name in self.roles:
                self.roles[name].stop()
            self.clients.router_died(router)
            if restart_s is not None:
                self.timeline.after(restart_s, self._start_router, name)
        elif not self.workers[name].is_dead:
            self._retire(self.workers[name])
            self.workers[name].kill()
            if restart_s is not None:
                self.timeline.after(restart_s, self._restart, name)

    def _restart(self, name: str) -> None:
        self.note(f"{name} starts again")
        self._start_worker(name, self._roles[name])

    def _retire(self, worker: SimWorker) -> None:
        """Its counters count on."""
        self._num_steps_before += worker.loop.runner.num_steps
        self._count(worker.core.counters.items())
        self._count(worker.loop.engine.counters())

    def _count(self, counters: Iterable[tuple[str, float]]) -> None:
        for name, value in counters:
            self.record.counters[name] = self.record.counters.get(name, 0.0) + value

    # ---- looking ----

    def _sample(self) -> None:
        now, record = self.timeline.now, self.record
        interval_s = record.sample_interval_s
        for name, worker in self.workers.items():
            load = None if worker.is_dead else worker.core.load
            busy_s = worker.loop.runner.busy_s
            busy = min(1.0, max(0.0, busy_s - self._busy.get(name, 0.0)) / interval_s)
            self._busy[name] = busy_s
            used = 0.0 if load is None or not load.num_blocks else 1 - load.num_free_blocks / load.num_blocks
            running, waiting = (load.num_running, load.num_waiting) if load is not None else (0, 0)
            record.samples.append(
                WorkerSample(now - WARM_UP_S, name, self._roles[name].value, running, waiting, used, busy)
            )
        living = [router for router in self.routers.values() if not router.is_dead]
        num_waiting = sum(router.core.flights.num_waiting for router in living)
        num_running = sum(router.core.flights.num_running for router in living)
        record.router_samples.append(RouterSample(now - WARM_UP_S, num_waiting, num_running))
        record.thin()
        if not self._is_over():
            self.timeline.after(record.sample_interval_s, self._sample)

    def _check(self) -> None:
        """After every event: what is cheap to see, now and then everything."""
        self._num_unchecked += 1
        if self._num_unchecked >= self.settings.check_interval:
            self._num_unchecked = 0
            for worker in self.workers.values():
                check_worker(worker)
            for router in self.routers.values():
                check_router(router, self.router_config)

    def _is_over(self) -> bool:
        return self.clients.has_asked_all and not self.clients.waiting

    def run(self, progress: Callable[[float, int], None] | None = None) -> RunRecord:
        """To the end of the last request. Raises InvariantViolated. `progress` hears the virtual time and the number of requests that have ended."""
        began_s = time.perf_counter()
        self._start_all()
        if progress is not None:
            self._tell_progress(progress)
        each = self._check if self.settings.check_interval else None
        self.timeline.run(float("inf"), self._is_done, each)
        self._finish()
        self.record.wall_s = time.perf_counter() - began_s
        self.record.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self.record

    def _is_done(self) -> bool:
        clients = self.clients
        if not clients.has_asked_all:
            return False
        if not clients.waiting:
            return True
        if self.timeline.now > clients.asked_at_s + self.settings.patience_s:
            names = ", ".join(list(clients.waiting)[:5])
            raise InvariantViolated(f"{len(clients.waiting)} requests have not ended, such as {names}")
        return False

    def _tell_progress(self, progress: Callable[[float, int], None]) -> None:
        progress(self.timeline.now - WARM_UP_S, len(self.clients.records))
        if not self._is_over():
            self.timeline.after(1.0, self._tell_progress, progress)

    def _finish(self) -> None:
        """What is left of requests that have ended is gone soon; then nothing may be held."""
        record = self.record
        record.duration_s = self.timeline.now - WARM_UP_S
        last_fault_s = max((WARM_UP_S + fault.end_s for fault in self._faults), default=0.0)
        settle_s = max(self.timeline.now, last_fault_s) + self.worker_config.orphan_grace_s + 60.0
        self.timeline.run(settle_s, self._is_settled)
        check_idle(self.workers.values(), self.routers.values())
        for worker in self.workers.values():
            if not worker.is_dead:
                self._retire(worker)
        for router in self.routers.values():
            self._count(router.core.counters.items())
        record.num_events = self.timeline.num_events
        record.num_steps = self._num_steps_before
        record.requests = self.clients.records
        record.settings = describe(self.settings)

    def _is_settled(self) -> bool:
        if self._injector.num_inflicted < len(self._faults):
            return False
        living = [worker for worker in self.workers.values() if not worker.is_dead]
        return all(worker.is_idle and worker.loop.is_quiet for worker in living)


def describe(settings: Settings) -> dict[str, object]:
    """As plain JSON values."""
    values = {name: value for name, value in asdict(settings).items() if name != "profile"}
    return {**values, "profile": settings.profile.name}


def simulate(
    settings: Settings, trace: Iterable[TraceRequest] | Iterator[TraceRequest], faults: Iterable[Fault] = ()
) -> RunRecord:
    """Runs a simulation to its end."""
    return Simulation(settings, trace, faults).run()
