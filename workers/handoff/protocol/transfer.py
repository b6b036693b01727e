"""The one state machine of a KV transfer, the same at both ends: its states, the legal moves between them, and its lease. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from workers.errors import InvariantViolated

HEARTBEAT_S = 1.0
"""Each end says at least this often that it is alive."""


class TransferState(Enum):
    RESERVED = auto()
    """Both ends hold blocks for it, or are about to; nothing has been asked to travel."""
    SENDING = auto()
    """A transport is chosen, pieces travel."""
    LANDED = auto()
    """Every piece is in place and verified."""
    FAILED = auto()
    """Refused, cancelled, broken or given up."""
    EXPIRED = auto()
    """The other end has been silent for longer than its lease."""


LEGAL: dict[TransferState, frozenset[TransferState]] = {
    TransferState.RESERVED: frozenset({TransferState.SENDING, TransferState.FAILED, TransferState.EXPIRED}),
    TransferState.SENDING: frozenset({TransferState.LANDED, TransferState.FAILED, TransferState.EXPIRED}),
    TransferState.LANDED: frozenset(),
    TransferState.FAILED: frozenset(),
    TransferState.EXPIRED: frozenset(),
}


@dataclass(slots=True)
class Lease:
    """What each end grants the other: `ttl_s` of silence. Anything heard renews it; anything said makes a heartbeat unnecessary."""

    ttl_s: float
    heartbeat_s: float = HEARTBEAT_S
    heard_s: float = 0.0
    spoke_s: float = 0.0

    def begin(self, now: float) -> None:
        self.heard_s = self.spoke_s = now

    def heard(self, now: float) -> None:
        self.heard_s = now

    def spoke(self, now: float) -> None:
        self.spoke_s = now

    @property
    def expires_s(self) -> float:
        return self.heard_s + self.ttl_s

    @property
    def heartbeat_due_s(self) -> float:
        return self.spoke_s + self.heartbeat_s

    @property
    def next_deadline_s(self) -> float:
        """When somebody has to look again, should nothing happen before."""
        return min(self.expires_s, self.heartbeat_due_s)


@dataclass(slots=True)
class Transfer:
    """State and lease of one end of a transfer."""

    lease: Lease
    state: TransferState = field(default=TransferState.RESERVED)

    @property
    def is_over(self) -> bool:
        """No move leads on from here."""
        return not LEGAL[self.state]

    def move(self, state: TransferState) -> None:
        """Raises InvariantViolated, and changes nothing, when the table does not allow it."""
        if state not in LEGAL[self.state]:
            raise InvariantViolated(f"a transfer cannot go from {self.state.name} to {state.name}")
        self.state = state


# ---- events that both ends know ----


@dataclass(frozen=True, slots=True)
class Due:
    """The deadline that the session named has come."""
