"""A small world for the cores of role controllers: a store, workers and routers in virtual time, without sockets or models."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from cluster.roles import events
from cluster.roles.config import RolesConfig
from cluster.roles.core import RolesCore
from cluster.roles.outlook import RoleTargets
from cluster.roles.planner import Planner, RoleController
from cluster.roles.records import LEADER, SWITCHES, switch_of
from cluster.roles.switches import RoleSwitch
from cluster.roles.values import Observation
from cluster.store.store import Entry, Snapshot
from router.fleet.seen import WorkerSeen
from router.requests.demand import NUM_POINTS, DemandReport
from router.roles import Order
from workers.status import Role

STEP_S = 0.05
LEASE_S = 4.0
SECONDS = (0.004, 5e-5, 4e-9, 2e-5, 1e-9)
TARGETS = RoleTargets(2.0, 0.05)


def seen(worker_id: str, role: Role | None = None, **changes: object) -> WorkerSeen:
    """A worker at rest, in the role that its name says unless it is given."""
    role = role or Role(worker_id.partition("-")[0])
    worker = WorkerSeen(worker_id, role, 1, True, False, False, 0, 0, 8192, 8192, 64, 256, 8192, SECONDS, is_known=True)
    return replace(worker, **changes)  # type: ignore[arg-type]


def fleet(prefill: int, decode: int, mixed: int = 0) -> list[WorkerSeen]:
    counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
    return [seen(f"{role}-{at}", role) for role, count in counts.items() for at in range(count)]


def demand(rate: float, prompt: float = 1000, output: float = 200, waiting_tokens: float = 0.0) -> DemandReport:
    """A steady load: every prompt is alike and nothing of it is cached."""
    return DemandReport((rate, rate, rate), (prompt,) * NUM_POINTS, 1.0, output, waiting_tokens=waiting_tokens)


def observation(at_s: float, workers: Iterable[WorkerSeen], load: DemandReport, **changes: object) -> Observation:
    return replace(Observation(at_s, tuple(workers), (load,)), **changes)  # type: ignore[arg-type]


@dataclass
class StoryStore:
    """Entries with versions and leases. `blocked`: names of who cannot reach it."""

    now: float = 0.0
    version: int = 0
    epoch: int = 1
    entries: dict[str, tuple[Entry, float]] = field(default_factory=dict)
    blocked: set[str] = field(default_factory=set)

    def tick(self, now: float) -> None:
        self.now = now
        self.entries = {key: held for key, held in self.entries.items() if held[1] > now}

    def put(self, key: str, value: str, ttl_s: float | None) -> int:
        self.version += 1
        self.entries[key] = Entry(key, value, self.version), self.now + (ttl_s or float("inf"))
        return self.version

    def version_of(self, key: str) -> int:
        return self.entries[key][0].version if key in self.entries else 0

    def forget(self) -> None:
        """It has lost its memory."""
        self.epoch += 1
        self.entries.clear()

    def snapshot(self) -> Snapshot:
        return Snapshot(str(self.epoch), tuple(self.entries[key][0] for key in sorted(self.entries)))


class RolesStory:
    """Workers by id, cores by router. What runs on a draining worker goes away at `leaving_per_s`, unless it is stuck."""

    def __init__(
        self,
        workers: Iterable[WorkerSeen],
        routers: Iterable[str] = ("router-0",),
        config: RolesConfig | None = None,
        load: DemandReport | None = None,
    ) -> None:
        self.now = 0.0
        self.config = config or RolesConfig(mode="off")
        self.workers = {worker.worker_id: worker for worker in workers}
        self.stuck: set[str] = set()
        self.deaf: set[str] = set()
        """Workers that do nothing that they are told."""
        self.load = load or demand(0.0)
        self.store = StoryStore()
        self.cores: dict[str, RolesCore] = {}
        self.said: list[str] = []
        self.answers: dict[str, str] = {}
        self.roles_of: dict[tuple[str, int], Role] = {}
        self.steps: list[tuple[str, str]] = []
        """Worker and phase of each switch, as the store got them."""
        self.on_phase: Callable[[RoleSwitch], None] = lambda switch: None
        self._known: dict[str, object] = {}
        for name in routers:
            self.start(name)

    def start(self, name: str) -> None:
        """A router begins, or another one of its name."""

        def make_planner() -> Planner:
            return RoleController(self.config, TARGETS)

        self.cores[name] = RolesCore(self.config, name, make_planner, LEASE_S, lambda now: 1e9 + now)
        self._known.pop(name, None)

    def kill(self, name: str) -> None:
        del self.cores[name]

    def order(self, router: str, order: Order, name: str = "order-1") -> None:
        self._handle(router, events.Ordered(name, order))

    def change(self, worker_id: str, **changes: object) -> None:
        self.workers[worker_id] = replace(self.workers[worker_id], **changes)  # type: ignore[arg-type]

    def restart(self, worker_id: str, role: Role | None = None) -> None:
        """It comes back with nothing on it, in a later generation, and as drained as it was."""
        worker = self.workers[worker_id]
        self.change(
            worker_id,
            generation=(worker.generation // 1000 + 1) * 1000,
            role=role or worker.role,
            num_sequences=0,
            is_up=True,
        )

    @property
    def leader(self) -> str:
        return self.store.entries[LEADER][0].value if LEADER in self.store.entries else ""

    def switch(self, worker_id: str) -> RoleSwitch | None:
        held = self.store.entries.get(SWITCHES + worker_id)
        return switch_of(held[0].value) if held else None

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end_s = self.now + seconds
        while self.now < end_s and not until():
            self.now = round(self.now + STEP_S, 6)
            self.store.tick(self.now)
            for worker in list(self.workers.values()):
                if worker.is_draining and worker.num_sequences and worker.worker_id not in self.stuck:
                    self.change(worker.worker_id, num_sequences=max(0, worker.num_sequences - 1))
            for name in list(self.cores):
                self._show_store(name)
                workers = tuple(self.workers[worker_id] for worker_id in sorted(self.workers))
                self._handle(name, events.Looked(workers, self.load, 0.01))

    def _show_store(self, name: str) -> None:
        snapshot = self.store.snapshot()
        if name not in self.store.blocked and self._known.get(name) != snapshot:
            self._known[name] = snapshot
            self._handle(name, events.StoreSeen(snapshot))

    def _handle(self, name: str, event: events.Event) -> None:
        waiting = deque([event])
        while waiting and name in self.cores:
            for command in self.cores[name].handle(waiting.popleft(), self.now):
                answer = self._execute(name, command)
                if answer is not None:
                    waiting.append(answer)

    def _execute(self, name: str, command: events.Command) -> events.Event | None:
        store, reaches = self.store, name not in self.store.blocked
        match command:
            case events.Write(key, version, value, ttl_s):
                if not reaches:
                    return events.Wrote(key, value, None, failed=True)
                if version != store.version_of(key):
                    return events.Wrote(key, value, None)
                written = store.put(key, value, ttl_s)
                if key.startswith(SWITCHES) and (switch := switch_of(value)) is not None:
                    self.steps.append((switch.worker_id, switch.phase.value))
                    self.on_phase(switch)
                    if name not in self.cores:  # it died right after it had written
                        return None
                return events.Wrote(key, value, written)
            case events.Renew(key, version, ttl_s):
                if not reaches:
                    return events.Renewed(False, self.now, failed=True)
                is_kept = key in store.entries and store.version_of(key) == version
                if is_kept:
                    store.entries[key] = store.entries[key][0], self.now + ttl_s
                return events.Renewed(is_kept, self.now)
            case events.Put(key, value, ttl_s):
                if reaches:
                    store.put(key, value, ttl_s)
            case events.Remove(key, version):
                if reaches and version in (0, store.version_of(key)):
                    store.entries.pop(key, None)
            case events.SetRole(worker_id, role, generation):
                self._set_role(worker_id, role, generation)
            case events.SetDraining(worker_id, is_draining):
                if worker_id not in self.deaf and self.workers[worker_id].is_up:
                    self.change(worker_id, is_draining=is_draining)
            case events.Answer(order, error):
                self.answers[order] = error
            case events.Say(text):
                self.said.append(text)
        return None

    def _set_role(self, worker_id: str, role: Role, generation: int) -> None:
        """As a worker does: from one generation, which rises. A generation has one role."""
        worker = self.workers[worker_id]
        if worker_id in self.deaf or not worker.is_up or worker.generation != generation:
            return
        self.change(worker_id, role=role, generation=generation + 1)
        assert self.roles_of.setdefault((worker_id, generation + 1), role) is role
