"""Names every failure a worker or router can report, and whose fault it is."""

from __future__ import annotations

from enum import StrEnum


class BatonError(Exception):
    """Base of all errors that Baton raises on purpose."""


class InvalidRequest(BatonError):
    """The caller's fault: the request can never be served as it stands.

    `param` names the offending field as the HTTP API spells it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidConfig(BatonError):
    """The operator's fault: a setting that cannot work. The message says what to change."""


class InvariantViolated(BatonError):
    """Our fault: a state that the code promises cannot occur."""


class Refusal(StrEnum):
    """Why a request was not accepted, or was given up; each maps to one HTTP status and one metric label."""

    INVALID = "invalid_request"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"
    NO_WORKERS = "no_workers"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    TARGET_MISSED = "target_missed"
    WORKER_LOST = "worker_lost"
    WORKERS_DIED = "workers_died"
    """One worker after the other was lost while it ran the request, which may be the cause."""
    WRONG_ROLE = "wrong_role"
    STALE_GENERATION = "stale_generation"
    DRAINING = "draining"
    NOT_MOVABLE = "not_movable"
    NOT_KEPT = "not_kept"
    TAKEN_UP = "taken_up"
    CANCELLED = "cancelled"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal_error"


class Refused(BatonError):
    """A request that was refused or given up for the reason in `refusal`."""

    def __init__(self, refusal: Refusal, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.retry_after_s = retry_after_s


class WorkerLost(BatonError):
    """The world's fault: a worker's connection broke."""


class StreamDamaged(BatonError):
    """The world's fault: a message of a stream was lost, repeated or overtaken on its way."""


class TransferFailed(BatonError):
    """The world's fault: a KV handoff did not land; the blocks it wrote must not be used."""


class RankLost(BatonError):
    """The world's fault: a group of ranks broke apart in mid-step; it will be put together again."""


class DeviceStuck(BatonError):
    """The world's fault: a device waits for a rank that is gone, or computes nothing any more since an operation on it has
    failed, and nothing but the end of this process can end that."""


class PoolsLost(BatonError):
    """The world's fault: a batch was not computed. It can run again, once what lived in `pools` has been computed again.

    With no pools lost nothing has to be computed again.
    """

    def __init__(self, pools: tuple[int, ...], message: str) -> None:
        super().__init__(message)
        self.pools = pools
