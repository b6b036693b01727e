"""Decides which failed attempts are run again, how soon, and when to give up. Knows nothing of where they run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from workers.errors import Refusal


class Treatment(Enum):
    """FINAL: the client gets it. FAULT: run again, a few times without progress. BUSY: run again, for a while. ONCE: run again once."""

    FINAL = "final"
    FAULT = "fault"
    BUSY = "busy"
    ONCE = "once"


TREATMENTS: dict[Refusal, Treatment] = {
    Refusal.INVALID: Treatment.FINAL,
    Refusal.RATE_LIMITED: Treatment.FINAL,
    Refusal.DEADLINE_EXCEEDED: Treatment.FINAL,
    Refusal.WORKER_LOST: Treatment.FAULT,
    Refusal.WORKERS_DIED: Treatment.FINAL,
    Refusal.NO_WORKERS: Treatment.FAULT,
    Refusal.QUEUE_FULL: Treatment.BUSY,
    Refusal.WRONG_ROLE: Treatment.BUSY,
    Refusal.STALE_GENERATION: Treatment.BUSY,
    Refusal.DRAINING: Treatment.BUSY,
    Refusal.NOT_MOVABLE: Treatment.BUSY,
    Refusal.NOT_KEPT: Treatment.BUSY,
    Refusal.TAKEN_UP: Treatment.FINAL,
    Refusal.SHUTTING_DOWN: Treatment.BUSY,
    Refusal.INTERNAL: Treatment.ONCE,
}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of re-runs; times in seconds.

    `max_attempts` counts attempts in a row that brought no token: a request that makes progress may be re-run for ever,
    one that does not may not. One under which `max_lost_workers` in a row were lost may be what kills them. A busy cluster is asked again until it has refused for `patience_s` without a break.
    The first re-run is immediate, later ones wait `backoff_s`, doubled each time, at most `max_backoff_s`.
    """

    max_attempts: int = 5
    max_lost_workers: int = 2
    backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    patience_s: float = 60.0


@dataclass(slots=True)
class RetryHistory:
    """What went wrong with one request since it last made progress (INTERNAL: since it began)."""

    num_setbacks: int = 0
    num_faults: int = 0
    num_lost_workers: int = 0
    """That have not come back with what they ran."""
    num_internal: int = 0
    busy_since_s: float = 0.0
    """When the last run of refusals by busy workers began; the time that an attempt ran on a worker is not such."""
    last_refusal: Refusal | None = None

    def progress(self) -> None:
        self.num_setbacks = 0
        self.num_faults = 0
        self.num_lost_workers = 0
        self.last_refusal = None

    def worker_lost(self, policy: RetryPolicy) -> bool:
        """A worker is gone while it ran the request. Returns whether that was one too many."""
        self.num_lost_workers += 1
        return self.num_lost_workers >= policy.max_lost_workers

    def worker_is_back(self) -> None:
        """It was the connection that was lost, and not the worker."""
        self.num_lost_workers = max(0, self.num_lost_workers - 1)

    def setback(self, refusal: Refusal, policy: RetryPolicy, now: float) -> float | None:
        """Records a failed attempt. Returns the seconds to wait before the next one; None: give up."""
        if self.last_refusal is None or TREATMENTS[self.last_refusal] is not Treatment.BUSY:
            self.busy_since_s = now
        self.num_setbacks += 1
        self.last_refusal = refusal
        match TREATMENTS[refusal]:
            case Treatment.FINAL:
                return None
            case Treatment.FAULT:
                self.num_faults += 1
                if self.num_faults >= policy.max_attempts:
                    return None
            case Treatment.BUSY:
                if now - self.busy_since_s > policy.patience_s:
                    return None
            case Treatment.ONCE:
                self.num_internal += 1
                if self.num_internal > 1:
                    return None
        if self.num_setbacks == 1:
            return 0.0
        return float(min(policy.backoff_s * 2 ** min(self.num_setbacks - 2, 30), policy.max_backoff_s))
