"""What a router shows of roles and whom it asks to change them; the cluster decides on roles and carries it out (cluster.roles)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from workers.status import Role


@dataclass(frozen=True, slots=True)
class Order:
    """What an operator wants of a worker. `role` None: it stays; `is_draining`, `is_pinned` None: these stay."""

    worker_id: str
    role: Role | None = None
    is_draining: bool | None = None
    is_pinned: bool | None = None
    force: bool = False
    """Even if nothing could prefill or decode afterwards."""


class RoleDesk(Protocol):
    """Takes orders for the cluster's role controller."""

    async def carry_out(self, order: Order) -> None:
        """Returns once it is done. Raises InvalidRequest for what cannot be, Refused when it failed or took too long."""
        ...


@dataclass(frozen=True, slots=True)
class SwitchCount:
    """How often roles were switched so, by the controller that runs in this router."""

    source: str
    target: str
    reason: str
    outcome: str
    count: int


@dataclass(frozen=True, slots=True)
class RolesReport:
    """The role controller as this router knows it. `page` is what GET /admin/roles answers; the rest is measured for /metrics.

    `phase_s`: p50 and p99 of the seconds that each phase of a switch took; gains in good requests a second.
    """

    page: Mapping[str, Any] = field(default_factory=dict)
    leads: bool = False
    desired_workers: int = 0
    counts: tuple[SwitchCount, ...] = ()
    phase_s: tuple[tuple[str, float, float], ...] = ()
    predicted_gain: float = 0.0
    measured_gain: float = 0.0
