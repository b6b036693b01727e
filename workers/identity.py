"""Who a worker is now, for all its parts; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from workers.status import Role, WorkerAddress


@dataclass(slots=True)
class Identity:
    """Who the worker is now; the worker owns it, others read."""

    worker_id: str
    role: Role
    generation: int
    target: str = ""
    is_draining: bool = False
    """Takes no new work."""
    is_rebuilding: bool = False
    """A rank is missing; nothing new is accepted."""

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(self.worker_id, self.generation, self.target)
