"""Decides to which workers the router keeps a stream, when it gives one up, and which model it serves. Knows no requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from router.events import Attach
from router.fleet.worker_entry import Backlog, OptimisticLoad, WorkerEntry
from router.fleet.worker_table import WorkerTable
from router.forecast.steps import StepTimes
from workers.errors import InvalidRequest
from workers.status import ModelInfo, Role, WorkerAddress, starts_of
from workers.wire.attach import WorkerFrame

FIRST_RECONNECT_S, MAX_RECONNECT_S = 0.1, 2.0
MAX_STALE_AT_ONCE = 8
"""Workers given up for silence in one tick: to take up what ran on all of them is more than to wait a little longer."""


class Fleet:
    """All workers that are members or still have a stream, in the order in which they came; at most one stream each.

    What time may do to workers is found without a walk over all of them: they stand in an order or a set of their own.
    """

    def __init__(
        self, settle_s: float, stale_s: float, tick_s: float, recovery_s: float, backlog: Backlog, steps: StepTimes
    ) -> None:
        self._settle_s = settle_s
        self._recovery_s = recovery_s
        self._backlog = backlog
        self._step_times = steps
        self._stale_s = stale_s
        self._longest_step_s = max(stale_s / 10, 2 * tick_s)
        """A tick that comes later than this after the one before it says that the router itself stood still."""
        self._ticked_s: float | None = None
        self._awake_s = 0.0
        """A clock that stands still while the router does, so that it does not take its own silence for that of its workers."""
        self._entries: dict[str, WorkerEntry] = {}
        self._open: OrderedDict[str, WorkerEntry] = OrderedDict()
        """Those with a stream; the one that has been silent longest comes first."""
        self._closed: dict[str, WorkerEntry] = {}
        """The others."""
        self._strangers: dict[str, WorkerEntry] = {}
        """Those with a stream that are no members any more."""
        self._must_move: dict[str, WorkerEntry] = {}
        """Those that must be left, where something runs; perhaps others, too."""
        self._num_connections = 0
        self.table = WorkerTable()
        self.model: ModelInfo | None = None
        """The served model; None until a first worker has reported."""

    def __iter__(self) -> Iterator[WorkerEntry]:
        return iter(self._entries.values())

    def get(self, worker_id: str) -> WorkerEntry | None:
        return self._entries.get(worker_id)

    def at(self, row: int) -> WorkerEntry:
        """The worker of a row of the table."""
        return self._entries[self.table.ids[row]]

    def on_connection(self, worker_id: str, connection: int) -> WorkerEntry | None:
        """The worker, if this is its current connection."""
        entry = self._entries.get(worker_id)
        return entry if entry is not None and entry.connection == connection else None

    @property
    def can_decode(self) -> bool:
        return self.table.num_decoding > 0

    def set_backlog(self, backlog: Backlog) -> None:
        """So much may wait at each worker from now on."""
        if backlog == self._backlog:
            return
        self._backlog = backlog
        for entry in self:
            entry.backlog = backlog
            entry.show_load()

    def set_members(self, addresses: Iterable[WorkerAddress]) -> list[WorkerEntry]:
        """Takes over a membership. Returns the workers that have moved or restarted: their streams lead nowhere.

        A worker that is no member any more keeps its stream as long as requests run there.
        """
        members = {address.worker_id: address for address in addresses}
        moved: list[WorkerEntry] = []
        for worker_id, address in sorted(members.items()):
            known = self._entries.get(worker_id)
            if known is None:
                row = self.table.add(worker_id)
                entry = WorkerEntry(address, OptimisticLoad(self._settle_s), self.table, row, self._backlog)
                entry.show_load()
                self._entries[worker_id] = self._closed[worker_id] = entry
                continue
            is_restarted = starts_of(address.generation) > starts_of(max(known.generation, known.address.generation))
            if is_restarted or address.target != known.address.target:
                moved.append(known)
            known.address = address
        for entry in self:
            entry.is_member = entry.worker_id in members
            entry.show_roles()
            self.note_must_move(entry)
        self._strangers = {e.worker_id: e for e in self if not e.is_member and e.connection is not None}
        return moved

    def connect(self, now: float) -> list[Attach]:
        """Opens the streams that are due; forgets workers that are neither members nor connected."""
        attaches: list[Attach] = []
        for entry in list(self._closed.values()):
            if not entry.is_member:
                del self._entries[entry.worker_id], self._closed[entry.worker_id]
                self.table.remove(entry.row)
            elif entry.retry_at_s <= now:
                self._num_connections += 1
                entry.connection = self._num_connections
                entry.last_frame_s = now
                entry.heard_awake_s = self._awake_s
                del self._closed[entry.worker_id]
                self._open[entry.worker_id] = entry
                attaches.append(Attach(entry.worker_id, entry.connection, entry.address.target))
        return attaches

    def apply_frame(self, entry: WorkerEntry, frame: WorkerFrame, now: float) -> None:
        """A frame came on the worker's current connection."""
        entry.update(frame, now)
        entry.heard_awake_s = self._awake_s
        self._open.move_to_end(entry.address.worker_id)
        if frame.status is not None:
            self.note_must_move(entry)
            kind = self._step_times.kind_of(frame.status)
            self.table.batch_tokens[entry.row] = frame.status.max_batch_tokens
            if kind != entry.kind:
                entry.kind = kind
                self._step_times.show_worker(self.table, entry.row, kind)

    def close(self, entry: WorkerEntry, retry_at_s: float) -> None:
        """The worker's stream is gone."""
        entry.close(retry_at_s)
        self._open.pop(entry.worker_id, None)
        self._strangers.pop(entry.worker_id, None)
        self._closed[entry.worker_id] = entry

    def stale(self, now: float) -> list[WorkerEntry]:
        """Workers whose stream is open and silent for too long: a healthy one speaks about once a second. Asked once a tick.

        A tick that is late itself gives nobody up: frames of the meantime wait to be read.
        """
        step_s = now - self._ticked_s if self._ticked_s is not None else 0.0
        self._ticked_s = now
        self._awake_s += min(step_s, self._longest_step_s)
        stale: list[WorkerEntry] = []
        if step_s <= self._longest_step_s:
            for entry in self._open.values():
                if len(stale) == MAX_STALE_AT_ONCE or self._awake_s - entry.heard_awake_s <= self._stale_s:
                    break
                stale.append(entry)
        return stale

    def left(self) -> list[WorkerEntry]:
        """Workers that are no members any more and run nothing of this router's."""
        return [entry for entry in self._strangers.values() if not entry.attempts]

    def note_must_move(self, entry: WorkerEntry) -> None:
        """Something runs there, or it has changed: perhaps what runs there must go elsewhere."""
        if entry.attempts and entry.must_move_decodes:
            self._must_move[entry.worker_id] = entry

    def to_leave(self) -> list[WorkerEntry]:
        """Workers whose running requests shall go on elsewhere."""
        self._must_move = {
            name: entry for name, entry in self._must_move.items() if entry.attempts and entry.must_move_decodes
        }
        return list(self._must_move.values())

    def check_model(self, entry: WorkerEntry, is_idle: bool, now: float) -> bool:
        """Compares the model of a worker that has reported with the served one. True: its model is served instead from now on.

        One model at a time: another is taken over when the router is idle (nothing runs), and no worker of the old one takes
        requests or may be back soon.
        """
        if entry.status is None:
            return False
        model, served = entry.status.model, self.model
        is_another = served is not None and served.fingerprint != model.fingerprint
        if is_another:
            entry.is_expected = False
            entry.show_roles()
            if self.table.num_taking or not is_idle or any(self._may_be_back(other, now) for other in self):
                return False
        self.model = model
        entry.is_expected = True
        entry.show_roles()
        return is_another

    def _may_be_back(self, entry: WorkerEntry, now: float) -> bool:
        """A member that served the model and has just lost its stream."""
        is_away = entry.is_member and not entry.is_up and entry.is_expected and entry.status is not None
        return is_away and now - entry.last_frame_s < self._recovery_s

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
        if not (decodes or self.table.num_decoding - entry.can_decode > 0):
            raise InvalidRequest(f"no worker could decode if {change}; use force to do it", param)
        if not (prefills or self.table.num_prefilling - entry.can_prefill > 0):
            raise InvalidRequest(f"no worker could prefill if {change}; use force to do it", param)


def reconnect_delay_s(num_failures: int) -> float:
    """Seconds until the next try after so many connections in a row that brought nothing."""
    return float(min(FIRST_RECONNECT_S * 2 ** min(num_failures, 30), MAX_RECONNECT_S))
