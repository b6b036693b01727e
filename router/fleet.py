"""Decides to which workers the router keeps a stream, when it gives one up, and which model it serves. Knows no requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from router.charges import Charges
from router.events import Attach
from router.view import WorkerEntry
from workers.errors import InvalidRequest
from workers.status import ModelInfo, Role, WorkerAddress, starts_of

FIRST_RECONNECT_S, MAX_RECONNECT_S = 0.1, 2.0


class Fleet:
    """All workers that are members or still have a stream, in the order of their ids; at most one stream each."""

    def __init__(self, settle_s: float, stale_s: float) -> None:
        self._settle_s = settle_s
        self._stale_s = stale_s
        self._entries: dict[str, WorkerEntry] = {}
        self._num_connections = 0
        self.model: ModelInfo | None = None
        """The served model; None until a first worker has reported."""

    def __iter__(self) -> Iterator[WorkerEntry]:
        return iter(self._entries.values())

    def get(self, worker_id: str) -> WorkerEntry | None:
        return self._entries.get(worker_id)

    def on_connection(self, worker_id: str, connection: int) -> WorkerEntry | None:
        """The worker, if this is its current connection."""
        entry = self._entries.get(worker_id)
        return entry if entry is not None and entry.connection == connection else None

    @property
    def can_decode(self) -> bool:
        return any(entry.can_decode for entry in self)

    @property
    def can_prefill(self) -> bool:
        return any(entry.can_prefill for entry in self)

    def set_members(self, addresses: Iterable[WorkerAddress]) -> list[WorkerEntry]:
        """Takes over a membership. Returns the workers that have moved or restarted: their streams lead nowhere.

        A worker that is no member any more keeps its stream as long as requests run there.
        """
        members = {address.worker_id: address for address in addresses}
        for entry in self:
            entry.is_member = entry.worker_id in members
        moved: list[WorkerEntry] = []
        for worker_id, address in members.items():
            known = self._entries.get(worker_id)
            if known is None:
                self._entries[worker_id] = WorkerEntry(address, Charges(self._settle_s))
                continue
            is_restarted = starts_of(address.generation) > starts_of(max(known.generation, known.address.generation))
            if is_restarted or address.target != known.address.target:
                moved.append(known)
            known.address = address
        self._entries = dict(sorted(self._entries.items()))
        return moved

    def connect(self, now: float) -> list[Attach]:
        """Opens the streams that are due; forgets workers that are neither members nor connected."""
        attaches: list[Attach] = []
        for entry in list(self):
            if entry.connection is not None:
                continue
            if not entry.is_member:
                del self._entries[entry.worker_id]
            elif entry.retry_at_s <= now:
                self._num_connections += 1
                entry.connection = self._num_connections
                entry.last_frame_s = now
                attaches.append(Attach(entry.worker_id, entry.connection, entry.address.target))
        return attaches

    def stale(self, now: float) -> list[WorkerEntry]:
        """Workers whose stream is open and silent for too long: a healthy one speaks about once a second."""
        return [e for e in self if e.connection is not None and now - e.last_frame_s > self._stale_s]

    def check_model(self, entry: WorkerEntry, is_idle: bool) -> None:
        """Compares the model of a worker that has reported with the served one.

        One model at a time: another is taken over when no worker of the old one takes requests and the router is idle.
        """
        if entry.status is None:
            return
        model = entry.status.model
        if self.model is not None and self.model.fingerprint != model.fingerprint:
            is_served = any(other.takes_requests for other in self if other is not entry)
            entry.is_expected = False
            if is_served or not is_idle:
                return
        self.model = model
        entry.is_expected = True

    def check_role(self, worker_id: str, role: Role, force: bool) -> WorkerEntry:
        """The worker, when its switch to `role` leaves a working cluster, or with `force`. Raises InvalidRequest."""
        entry = self._connected(worker_id)
        if not force:
            self._check_without(entry, role.can_decode, role.can_prefill, f"{worker_id!r} became {role}", "role")
        return entry

    def check_draining(self, worker_id: str, is_draining: bool, force: bool) -> WorkerEntry:
        """As `check_role`, for a worker that shall take no more work, or take it again."""
        entry = self._connected(worker_id)
        if is_draining and not force:
            # It is asked only for what it gives now: a decode worker may drain where nobody prefills anyway.
            can_decode, can_prefill = not entry.can_decode, not entry.can_prefill
            self._check_without(entry, can_decode, can_prefill, f"{worker_id!r} were drained", "worker_id")
        return entry

    def _connected(self, worker_id: str) -> WorkerEntry:
        entry = self._entries.get(worker_id)
        if entry is None or not entry.is_up:
            raise InvalidRequest(f"worker {worker_id!r} is not connected", "worker_id")
        return entry

    def _check_without(self, entry: WorkerEntry, decodes: bool, prefills: bool, change: str, param: str) -> None:
        others = [other for other in self if other is not entry]
        if not (decodes or any(other.can_decode for other in others)):
            raise InvalidRequest(f"no worker could decode if {change}; use force to do it", param)
        if not (prefills or any(other.can_prefill for other in others)):
            raise InvalidRequest(f"no worker could prefill if {change}; use force to do it", param)


def reconnect_delay_s(num_failures: int) -> float:
    """Seconds until the next try after so many connections in a row that brought nothing."""
    return float(min(FIRST_RECONNECT_S * 2 ** min(num_failures, 30), MAX_RECONNECT_S))
