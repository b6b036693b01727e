"""What the HTTP API needs from the part that runs requests; implemented by router.driver and, in tests, by an engine in the same process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from router.forecast.forecasts import ForecastStatus
from workers.request import Output, Request
from workers.status import ModelInfo, Role, WorkerStatus


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
class RouterStatus:
    """The router's whole public state."""

    router_id: str
    workers: tuple[WorkerView, ...]
    num_waiting: int
    num_running: int
    counters: tuple[tuple[str, float], ...] = ()
    forecast: ForecastStatus = field(default_factory=ForecastStatus)


class OutputStream(Protocol):
    """Outputs of one accepted request, in order, without gap or repeat; ends after the one with a finish_reason."""

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

    def submit(self, request: Request) -> OutputStream:
        """Accepts a request at once or raises Refused (QUEUE_FULL, NO_WORKERS, SHUTTING_DOWN) or InvalidRequest."""
        ...

    def status(self) -> RouterStatus: ...

    async def set_role(self, worker_id: str, role: Role, force: bool = False) -> WorkerStatus:
        """Switches a live worker's role; returns once the worker has it.

        Raises InvalidRequest for an unknown worker, or (without `force`) when no worker could prefill or decode afterwards.
        """
        ...

    async def set_draining(self, worker_id: str, is_draining: bool, force: bool = False) -> WorkerStatus:
        """Has a worker take no new work (its running requests move away as others have room), or take it again.

        Returns once the worker has said so; raises as `set_role` does.
        """
        ...
