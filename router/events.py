"""The values that go into the router core (events) and come out of it (commands).

A `connection` numbers one attempt to keep a stream to one worker: what an old connection still says is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.job_part import NO_JOB, FoundJob, JobPart
from router.policies.explain import Decision
from router.wishes import NO_WISHES, Wishes
from workers.errors import Refusal
from workers.request import Output, Request
from workers.status import WorkerAddress
from workers.wire.attach import WorkerFrame, WorkerMessage

# ---- events ----


@dataclass(frozen=True, slots=True)
class WorkersChanged:
    """The cluster's members now are these."""

    addresses: tuple[WorkerAddress, ...]


class FrameArrived(NamedTuple):
    """A tuple, as the frame is."""

    worker_id: str
    connection: int
    frame: WorkerFrame


@dataclass(frozen=True, slots=True)
class WorkerDetached:
    """A stream ended, or could not be opened, or its send queue is full."""

    worker_id: str
    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class RequestArrived:
    request: Request
    wishes: Wishes = NO_WISHES
    part: JobPart = NO_JOB


@dataclass(frozen=True, slots=True)
class JobSought:
    """Some router's client asks for a job: all workers are asked for it. `ends`: what they have of it is to end."""

    number: int
    job: str
    ends: bool = False


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """Nobody reads this request's outputs any more. `reason` names a counter."""

    request_id: str
    reason: str = "client_gone"


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class ShutDown:
    """End every request and every stream."""


Event = WorkersChanged | FrameArrived | WorkerDetached | RequestArrived | RequestCancelled | JobSought | Tick | ShutDown

# ---- commands ----


@dataclass(frozen=True, slots=True)
class Attach:
    """Open a stream; its frames and its end come back as events with this connection number."""

    worker_id: str
    connection: int
    target: str


@dataclass(frozen=True, slots=True)
class Detach:
    """Close a stream; no event is expected."""

    worker_id: str
    connection: int


@dataclass(frozen=True, slots=True)
class SendMessage:
    worker_id: str
    connection: int
    message: WorkerMessage


class Deliver(NamedTuple):
    """An output for the client; the last one has a finish_reason. A tuple, as the output is."""

    output: Output


@dataclass(frozen=True, slots=True)
class Reject:
    """A request was not accepted; it leaves no trace."""

    request_id: str
    refusal: Refusal
    message: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class TellFound:
    """Every worker has answered, or all there is of the job has been found, or the time is up."""

    number: int
    found: FoundJob


@dataclass(frozen=True, slots=True)
class Explain:
    """How a request was routed, for a client that wants to know. It may come again: a request that is run again is routed again."""

    request_id: str
    decision: Decision


@dataclass(frozen=True, slots=True)
class JobEnded:
    """Another router has ended a job: what is kept of it here is to be forgotten."""

    job: str


Command = Attach | Detach | SendMessage | Deliver | Reject | TellFound | JobEnded | Explain
