"""What routers have said that waits with them for a worker, for other routers that ask. Knows only what it was told."""

from __future__ import annotations

from workers.wire.attach import Waits

MAX_JOBS = 4096
"""Of one router."""
MAX_TICKET_BYTES = 16 << 20
"""Of the tickets of one router's jobs; what it says beyond that is not kept, and other routers do not find those jobs."""


class WaitingJobs:
    """By session. What a session has said ends with it."""

    def __init__(self) -> None:
        self._jobs: dict[int, dict[str, Waits]] = {}
        self._num_bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def say(self, session: int, waits: Waits) -> None:
        """The last word on a job counts."""
        jobs = self._jobs.setdefault(session, {})
        before = jobs.pop(waits.job, None)
        num_bytes = self._num_bytes.get(session, 0) - (len(before.ticket) if before is not None else 0)
        if waits.num_requests and len(jobs) < MAX_JOBS and num_bytes + len(waits.ticket) <= MAX_TICKET_BYTES:
            jobs[waits.job] = waits
            num_bytes += len(waits.ticket)
        self._num_bytes[session] = num_bytes

    def get(self, job: str) -> Waits | None:
        """None: it waits nowhere, as far as is known here."""
        return next((jobs[job] for jobs in self._jobs.values() if job in jobs), None)

    def lose(self, session: int) -> None:
        """Its router is gone."""
        self._jobs.pop(session, None)
        self._num_bytes.pop(session, None)
