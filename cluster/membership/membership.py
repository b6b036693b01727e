"""Decides who belongs to the cluster, from registrations in the store; pure: knows no store client, no clock, no Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass

from cluster.store.store import Snapshot, Store
from workers.errors import BatonError
from workers.status import Role, WorkerAddress

WORKERS = "workers/"
"""Registrations, one lease per worker: a new start of a worker overwrites the last one's at once."""
STARTS = "starts/"
"""The number of each worker's last start, the high part of its generation; see cluster.membership.registration.number_start."""
DRAINS = "drains/"
"""Workers that are to take no new work, without a lease, like roles."""
ROLES = "roles/"
"""Desired roles, without a lease: they outlive the worker."""


MAX_RECORD_CHARACTERS = 4096
"""Of a registration."""
DOUBT_LEASES = 10
"""A router keeps workers that vanish by the mass for so many leases."""


class Superseded(BatonError):
    """A newer start of the same worker has registered: this one must go."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What a worker writes under its lease."""

    address: WorkerAddress
    role: Role

    @property
    def key(self) -> str:
        return WORKERS + self.address.worker_id

    def encode(self) -> str:
        address = self.address
        return json.dumps(
            {
                "worker_id": address.worker_id,
                "generation": address.generation,
                "target": address.target,
                "role": self.role.value,
            }
        )

    @staticmethod
    def decode(text: str) -> Registration | None:
        """None when `text` is no registration: a stranger's entry must not take a router down."""
        if len(text) > MAX_RECORD_CHARACTERS:
            return None
        try:
            record = json.loads(text)
            worker_id, generation, target = record["worker_id"], record["generation"], record["target"]
            role = Role(record["role"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not (isinstance(worker_id, str) and worker_id and isinstance(target, str) and target):
            return None
        if type(generation) is not int or not 0 < generation < 2**63:
            return None
        return Registration(WorkerAddress(worker_id, generation, target), role)


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline that `Membership.deadline` named has come."""


class Membership:
    """The set of live workers.

    A lease that ended or was given up removes its worker. A store that comes back empty (its epoch changed) removes
    nobody for `grace_s`: live workers register again within a heartbeat, and meanwhile requests go on.

    When more than half of the workers vanish within `grace_s`, it is the store that is doubted: it stood still for longer than
    a lease. They stay for `doubt_s`. A router uses only those of them whose streams are healthy, and of these there may be all.
    """

    def __init__(self, grace_s: float, doubt_s: float = 0.0) -> None:
        self._grace_s = grace_s
        self._doubt_s = doubt_s
        self._vanished: dict[str, tuple[Registration, float]] = {}
        """Workers whose leases have ended within the last `grace_s`, and when."""
        self._epoch: str | None = None
        self._present: dict[str, Registration] = {}
        self._kept: dict[str, Registration] = {}
        self._kept_until: float | None = None
        self.refused: frozenset[str] = frozenset()
        """Keys of entries that are no registrations."""

    @property
    def deadline(self) -> float | None:
        """When the next Tick is due; None: never."""
        return self._kept_until

    @property
    def workers(self) -> tuple[Registration, ...]:
        """The members by worker id."""
        members = {**self._kept, **self._present}
        return tuple(members[worker_id] for worker_id in sorted(members))

    @property
    def addresses(self) -> tuple[WorkerAddress, ...]:
        return tuple(worker.address for worker in self.workers)

    def handle(self, event: Snapshot | Tick, now: float) -> tuple[WorkerAddress, ...] | None:
        """Takes in an event; returns the addresses to give to the router when they changed, else None."""
        before = self.addresses
        if self._kept_until is not None and now >= self._kept_until:
            self._kept, self._kept_until = {}, None
        if isinstance(event, Snapshot):
            self._take(event, now)
        return self.addresses if self.addresses != before else None

    def _take(self, snapshot: Snapshot, now: float) -> None:
        registrations: dict[str, Registration] = {}
        refused = set()
        for entry in snapshot.entries:
            registration = Registration.decode(entry.value)
            if registration is not None and registration.key == entry.key:
                registrations[registration.address.worker_id] = registration
            else:
                refused.add(entry.key)
        self.refused = frozenset(refused)
        if self._epoch is not None and snapshot.epoch != self._epoch:
            self._keep(self._present, now + self._grace_s)
        elif self._doubt_s:
            self._doubt(registrations, now)
        self._epoch = snapshot.epoch
        self._present = registrations
        for worker_id in registrations:
            self._kept.pop(worker_id, None)
        if not self._kept:
            self._kept_until = None

    def _keep(self, workers: dict[str, Registration], until: float) -> None:
        self._kept = {**self._kept, **workers}
        self._kept_until = until if self._kept_until is None else max(until, self._kept_until)

    def _doubt(self, registrations: dict[str, Registration], now: float) -> None:
        """Keeps workers that have vanished when those that are left are fewer."""
        for worker_id, registration in self._present.items():
            if worker_id not in registrations:
                self._vanished[worker_id] = registration, now
        self._vanished = {
            worker_id: (registration, since)
            for worker_id, (registration, since) in self._vanished.items()
            if worker_id not in registrations and now - since < self._grace_s
        }
        if len(self._vanished) > len(registrations):
            self._keep({name: registration for name, (registration, _) in self._vanished.items()}, now + self._doubt_s)
            self._vanished = {}


def resolve_role(configured: Role, remembered: str | None) -> Role:
    """A remembered role wins; one that this version does not know is as good as none."""
    if remembered is not None and remembered in {role.value for role in Role}:
        return Role(remembered)
    return configured


async def desired_role(store: Store, worker_id: str, configured: Role) -> Role:
    """The role that a worker must start in, so that a restart does not undo a switch."""
    entry = await store.get(ROLES + worker_id)
    return resolve_role(configured, entry.value if entry else None)


async def remember_role(store: Store, worker_id: str, role: Role, configured: Role) -> None:
    """Makes `role` the one that the worker comes back in; only a role that differs from the configured one is kept."""
    entry = await store.get(ROLES + worker_id)
    if role is configured:
        if entry is not None:
            await store.delete(entry.key, entry.version)
    elif entry is None or entry.value != role.value:
        await store.put(ROLES + worker_id, role.value)


async def forget_role(store: Store, worker_id: str) -> None:
    """Undoes earlier switches: the worker's next start takes its configured role."""
    await store.delete(ROLES + worker_id)


async def desired_draining(store: Store, worker_id: str) -> bool:
    """Whether a worker must start without taking work, so that a restart does not undo a drain."""
    return await store.get(DRAINS + worker_id) is not None


async def remember_draining(store: Store, worker_id: str, is_draining: bool) -> None:
    """Makes it what the worker comes back as."""
    if is_draining:
        await store.put(DRAINS + worker_id, "true")
    else:
        await store.delete(DRAINS + worker_id)


async def forget_draining(store: Store, worker_id: str) -> None:
    """The worker's next start takes work."""
    await store.delete(DRAINS + worker_id)
