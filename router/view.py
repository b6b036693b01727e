"""What the router knows of one worker: where it is, whether its stream is up, and what it last said of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.charges import Charges
from workers.client import WorkerFrame
from workers.status import Load, Role, WorkerAddress, WorkerStatus, starts_of


@dataclass(slots=True)
class WorkerEntry:
    """One worker. `connection` is the number of the open (or opening) stream; None: there is none, try at `retry_at_s`."""

    address: WorkerAddress
    charges: Charges
    is_member: bool = True
    connection: int | None = None
    is_up: bool = False
    """The open stream has brought a status."""
    is_expected: bool = True
    """Serves the model that this router serves."""
    status: WorkerStatus | None = None
    generation: int = 0
    load: Load = field(default_factory=Load)
    last_frame_s: float = 0.0
    """When the last frame arrived, or the stream was opened."""
    retry_at_s: float = 0.0
    num_failures: int = 0
    """Connections in a row that ended before a first status."""

    @property
    def worker_id(self) -> str:
        return self.address.worker_id

    @property
    def role(self) -> Role | None:
        return self.status.role if self.status is not None else None

    @property
    def takes_requests(self) -> bool:
        """A member whose stream is up, that serves the router's model, is whole and does not drain."""
        is_rebuilding = self.status is not None and self.status.is_rebuilding
        return self.is_up and self.is_member and self.is_expected and not self.is_draining and not is_rebuilding

    @property
    def is_draining(self) -> bool:
        return self.status is not None and self.status.is_draining

    @property
    def must_be_left(self) -> bool:
        """What decodes there is to go on elsewhere: it drains, leaves, or has another role by now."""
        return self.is_up and self.is_expected and self.status is not None and not self.can_decode

    @property
    def can_decode(self) -> bool:
        return self.takes_requests and self.status is not None and self.status.role.can_decode

    @property
    def can_prefill(self) -> bool:
        return self.takes_requests and self.status is not None and self.status.role.can_prefill

    def current_address(self) -> WorkerAddress:
        """Where peers find the worker, in the generation that it reported last."""
        return WorkerAddress(self.address.worker_id, self.generation, self.address.target)

    def fault_of(self, frame: WorkerFrame) -> str | None:
        """Why a frame cannot come from the worker that this stream was opened to; None: it can."""
        starts = starts_of(frame.generation)
        if starts < starts_of(self.address.generation):
            return "stale_process"
        if self.is_up and starts != starts_of(self.generation):
            return "restarted"
        if frame.status is not None:
            if frame.status.worker_id != self.worker_id:
                return "impostor"
            if self.is_up and self.status is not None and frame.status.pid != self.status.pid:
                return "restarted"
        return None

    def update(self, frame: WorkerFrame, now: float) -> None:
        """Takes over generation, status and load."""
        self.last_frame_s = now
        self.generation = frame.generation
        load = frame.load
        if frame.status is not None:
            self.status = frame.status
            self.is_up = True
            self.num_failures = 0
            load = load or frame.status.load
        if load is not None:
            self.load = load
            self.charges.settle(now)

    def close(self, retry_at_s: float) -> None:
        """The stream is gone."""
        self.connection = None
        self.is_up = False
        self.num_failures += 1
        self.retry_at_s = retry_at_s
        self.charges.clear()
