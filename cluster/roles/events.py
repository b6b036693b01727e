"""The values that go into the core of the role controllers (events) and come out of it (commands)."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.store.store import Snapshot
from router.fleet.seen import WorkerSeen
from router.requests.demand import DemandReport
from router.roles import Order
from workers.status import Role

# ---- events ----


@dataclass(frozen=True, slots=True)
class StoreSeen:
    """All that is under control/, at once and after each change."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Wrote:
    """The Write of that value is answered. `version` None: another one was written before, or the store did not answer (`failed`)."""

    key: str
    value: str
    version: int | None
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Renewed:
    """A Renew that was sent at `sent_s` is answered. False: the lease is another's by now, or gone."""

    is_kept: bool
    sent_s: float
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Looked:
    """What this process's router sees now."""

    workers: tuple[WorkerSeen, ...]
    demand: DemandReport
    handoff_s: float


@dataclass(frozen=True, slots=True)
class Ordered:
    """An operator wants something, by way of this process's router."""

    name: str
    order: Order


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Resign:
    """This process ends: the lease is given up."""


Event = StoreSeen | Wrote | Renewed | Looked | Ordered | Tick | Resign

# ---- commands ----


@dataclass(frozen=True, slots=True)
class Write:
    """By compare-and-set; answered by Wrote."""

    key: str
    version: int
    value: str
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """Whatever is there; no answer is expected. `ttl_s` None: it stays."""

    key: str
    value: str
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Renew:
    """Answered by Renewed."""

    key: str
    version: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Remove:
    """`version` 0: whichever is there."""

    key: str
    version: int = 0


@dataclass(frozen=True, slots=True)
class SetRole:
    """A worker takes a role, from that generation or not at all. Whether it did shows in what it reports."""

    worker_id: str
    role: Role
    generation: int


@dataclass(frozen=True, slots=True)
class SetDraining:
    worker_id: str
    is_draining: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """An order that came here is carried out, or was not, with why."""

    name: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Say:
    """For the log."""

    text: str


Command = Write | Put | Renew | Remove | SetRole | SetDraining | Answer | Say
