"""The jobs of which something waits at this router for a worker; one worker is told of each that waits for a while, so that other routers find it.

Knows no queue. A worker forgets what it was told when the router's stream ends, so nobody waits for what a dead router had.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import xxhash

from router.events import Command, SendMessage
from router.fleet.fleet import Fleet
from router.fleet.worker_entry import WorkerEntry
from router.requests.in_flight import InFlightRequest
from workers.wire.attach import Waits

TOLD_AFTER_S = 0.2
"""Most requests wait for less, and nobody asks for them so soon."""
MAX_TOLD_AT_ONCE = 64
"""In one tick, by all workers: what waits longer than requests usually do comes before them on no stream."""
MAX_TOLD_BYTES = 16 << 20
"""Of tickets, to one worker: it keeps no more of one router."""


@dataclass(slots=True, eq=False)
class _Job:
    since_s: float
    num_requests: int
    ticket: bytes
    waiting: dict[str, None] = field(default_factory=dict)
    """Ids of its requests that wait."""
    at: tuple[str, int] | None = None
    """The worker that was told, and the stream."""
    num_told_bytes: int = 0


class WaitingJobs:
    """Bounded by the queue. Appends to `out`."""

    def __init__(self, fleet: Fleet, out: list[Command]) -> None:
        self._fleet = fleet
        self._out = out
        self._jobs: dict[str, _Job] = {}
        self._untold: dict[str, None] = {}
        """Those no worker has been told of: as they came, then those whose worker was lost or has been told enough."""
        self._told_bytes: Counter[str] = Counter()
        """By worker."""
        self._over: list[tuple[str, tuple[str, int]]] = []
        """Those that wait no more, with who is to be told. Not at once: their workers may not have them yet."""

    def add(self, flight: InFlightRequest, now: float) -> None:
        """It waits from now on; without a job nobody asks for it."""
        kept = flight.part.kept
        if kept is None:
            return
        job = self._jobs.get(kept.job)
        if job is None:
            job = self._jobs[kept.job] = _Job(now, kept.num_requests, kept.ticket)
            self._untold[kept.job] = None
        job.ticket = job.ticket or kept.ticket
        job.waiting[flight.request.request_id] = None

    def remove(self, flight: InFlightRequest) -> None:
        """It has left the queue."""
        kept = flight.part.kept
        if kept is None:
            return
        job = self._jobs[kept.job]
        del job.waiting[flight.request.request_id]
        if not job.waiting:
            del self._jobs[kept.job]
            self._untold.pop(kept.job, None)
            if job.at is not None:
                self._told_bytes[job.at[0]] -= job.num_told_bytes
                self._over.append((kept.job, job.at))

    def of(self, job: str) -> tuple[str, ...]:
        """Ids of what waits of a job."""
        found = self._jobs.get(job)
        return () if found is None else tuple(found.waiting)

    def lose_worker(self, worker_id: str) -> None:
        """Others are to be told of what it was told."""
        del self._told_bytes[worker_id]
        for name, job in self._jobs.items():
            if job.at is not None and job.at[0] == worker_id:
                job.at = None
                self._untold[name] = None

    def check_time(self, now: float) -> None:
        """Tells workers what has changed. One that waits again is told anew, perhaps to another worker."""
        over, self._over = self._over, []
        for name, at in over:
            self._say(at, Waits(name))
        due = []
        for name in islice(self._untold, MAX_TOLD_AT_ONCE):
            if self._jobs[name].since_s + TOLD_AFTER_S > now:
                break
            due.append(name)
        workers = [entry for entry in self._fleet if entry.is_up and entry.connection is not None] if due else []
        for name in due if workers else ():
            self._tell(name, workers[xxhash.xxh3_64_intdigest(name.encode()) % len(workers)])

    def _tell(self, name: str, entry: WorkerEntry) -> None:
        job = self._jobs[name]
        del self._untold[name]
        if self._told_bytes[entry.worker_id] + len(job.ticket) > MAX_TOLD_BYTES:
            self._untold[name] = None  # others come before it next time
            return
        assert entry.connection is not None
        job.at, job.num_told_bytes = (entry.worker_id, entry.connection), len(job.ticket)
        self._told_bytes[entry.worker_id] += job.num_told_bytes
        self._say(job.at, Waits(name, job.num_requests, job.ticket))

    def _say(self, at: tuple[str, int], waits: Waits) -> None:
        entry: WorkerEntry | None = self._fleet.get(at[0])
        if entry is not None and entry.connection == at[1]:
            self._out.append(SendMessage(*at, waits))
