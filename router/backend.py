"""What the HTTP API needs from the part that runs requests, and the outputs of one request on their way to its client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from router.forecast.forecasts import ForecastStatus
from router.job_part import NO_JOB, FoundJob, JobPart
from router.policies.explain import Decision
from router.requests.journal import Incident, Way
from router.roles import RolesReport
from router.wishes import NO_WISHES, Wishes
from workers.errors import Refusal
from workers.request import FinishReason, Output, Request, merged
from workers.status import LoadProgress, ModelInfo, Role, WorkerStatus


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as the router sees it. `connected` False: known to the cluster, no stream at the moment."""

    status: WorkerStatus
    connected: bool
    frame_age_s: float
    num_requests: int
    speed: float = 1.0
    """How long its steps take in relation to what is usual for its kind, as the median of the last ones."""


@dataclass(frozen=True, slots=True)
class LoadingWorker:
    """A worker that is on its way, and no member yet. Of a group: its first rank."""

    worker_id: str
    role: Role
    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class ListedRouter:
    """A router of the cluster, as it has said of itself. `started_s`: since 1970."""

    router_id: str
    url: str = ""
    host: str = ""
    version: str = ""
    started_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """The router's whole public state."""

    router_id: str
    workers: tuple[WorkerView, ...]
    num_waiting: int
    num_running: int
    counters: tuple[tuple[str, float], ...] = ()
    forecast: ForecastStatus = field(default_factory=ForecastStatus)
    loading: tuple[LoadingWorker, ...] = ()
    routers: tuple[ListedRouter, ...] = ()
    """Those of the cluster, this one too; empty where nobody keeps a list."""


@dataclass(frozen=True, slots=True)
class Lookout:
    """What a router has before it and behind it. Times by its own clock, which says `now_s`."""

    now_s: float = 0.0
    ages: tuple[int, ...] = ()
    """Requests in flight by age; see router.requests.journal.AGES_S."""
    oldest: tuple[Way, ...] = ()
    """Of the requests in flight."""
    faults: tuple[Incident, ...] = ()
    """And recoveries, the newest first."""


class OutputStream(Protocol):
    """Outputs of one accepted request, in order, without gap or repeat; ends after the one with a finish_reason."""

    @property
    def decision(self) -> Decision | None:
        """How it was routed last, where that was asked for."""
        ...

    def take(self, wake: Callable[[], None]) -> Output | None:
        """What waits, as one output. None: nothing does. `wake` is called once when there is more, until the end has been taken.

        Raises what ended the stream before its time.
        """
        ...

    def close(self) -> None:
        """Before the end it cancels the request and frees everything it holds in the workers; once is enough."""
        ...


class Backend(Protocol):
    """Runs requests. All methods are called from one event loop."""

    @property
    def model(self) -> ModelInfo | None:
        """The served model; None until a first worker has reported."""
        ...

    def is_ready(self) -> bool:
        """True when a request could run now: some worker can decode. (It computes prompts itself when nobody else can.)"""
        ...

    def submit(self, request: Request, wishes: Wishes = NO_WISHES, part: JobPart = NO_JOB) -> OutputStream:
        """Accepts a request at once or raises Refused (QUEUE_FULL, TARGET_MISSED, NO_WORKERS, SHUTTING_DOWN) or InvalidRequest.

        With `part.at` it is taken up there, from its first token on; what is not kept there is computed anew.
        """
        ...

    async def find(self, job: str, ends: bool = False) -> FoundJob:
        """What all workers together have of a job, whichever router has sent it, or where it waits. `ends`: it is stopped, and kept no
        more."""
        ...

    @property
    def request_timeout_s(self) -> float:
        """The longest life of a request, waiting included."""
        ...

    on_job_ended: Callable[[str], None]
    """Called for a job that another router has ended. Whoever keeps something of jobs sets it."""

    def status(self) -> RouterStatus: ...

    async def set_role(
        self, worker_id: str, role: Role, force: bool = False, is_pinned: bool | None = None
    ) -> WorkerStatus:
        """Switches a live worker's role; returns once the worker has it. `is_pinned`: the role controller leaves it alone from now
        on, or does not any more; None: as it was.

        Raises InvalidRequest for an unknown worker, or (without `force`) when no worker could prefill or decode afterwards.
        """
        ...

    async def set_draining(self, worker_id: str, is_draining: bool, force: bool = False) -> WorkerStatus:
        """Has a worker take no new work (its running requests move away as others have room), or take it again.

        Returns once the worker has said so; raises as `set_role` does.
        """
        ...

    async def set_pinned(self, worker_id: str, is_pinned: bool) -> None:
        """Keeps a worker out of the role controller's hands, or gives it back. Raises InvalidRequest where there is none."""
        ...

    def lookout(self) -> Lookout:
        """The requests in flight, and faults of late."""
        ...

    def ways_of(self, asked: str) -> tuple[float, tuple[Way, ...]]:
        """Where a request, or all of an answer, has been; with the time now, as the steps' times are. Not long after its end it is forgotten."""
        ...

    def role_report(self) -> RolesReport:
        """What is known of roles and of who decides on them."""
        ...


class RequestStream:
    """An OutputStream. Outputs that wait for the reader become one, so what is kept grows with tokens."""

    def __init__(self, request_id: str, max_tokens: int, on_close: Callable[[str], None]) -> None:
        """`max_tokens` may wait; `on_close` is called when the reader leaves before the end."""
        self.request_id = request_id
        self.decision: Decision | None = None
        self._max_tokens = max_tokens
        self._on_close = on_close
        self._waiting: list[Output] = []
        self._num_tokens = 0
        """That wait."""
        self._wake: Callable[[], None] | None = None
        self._is_ended = False
        """The last output has been taken, or the reader has left."""

    def push(self, output: Output) -> bool:
        """Adds the next output. False: too many tokens wait, it was not added."""
        num_tokens = self._num_tokens + len(output.token_ids)
        if num_tokens > self._max_tokens and self._waiting:
            return False
        self._num_tokens = num_tokens
        self._waiting.append(output)
        if self._wake is not None:
            self._call()
        return True

    def fail(self, refusal: Refusal, message: str) -> None:
        """Adds an error as the last output; what waits stays."""
        position = self._waiting[0].position + self._num_tokens if self._waiting else 0
        self._waiting.append(
            Output(self.request_id, position, finish_reason=FinishReason.ERROR, refusal=refusal, message=message)
        )
        self._call()

    def take(self, wake: Callable[[], None]) -> Output | None:
        waiting = self._waiting
        self._wake = wake
        if not waiting:
            return None
        self._waiting, self._num_tokens = [], 0
        output = waiting[0] if len(waiting) == 1 else merged(waiting)
        self._is_ended = self._is_ended or output.finish_reason is not None
        return output

    def close(self) -> None:
        """Cancels the request, unless it has ended."""
        if not self._is_ended:
            self._is_ended = True
            self._on_close(self.request_id)

    def _call(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake()
