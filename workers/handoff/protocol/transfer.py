"""What both ends of a KV transfer share: its states, its lease, and the events that either knows. No I/O, no clock.

What leads from state to state is a table at each end: `SOURCE` in source_session.py, `TARGET` in target_session.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

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


LIVE = (TransferState.RESERVED, TransferState.SENDING)
OVER = (TransferState.LANDED, TransferState.FAILED, TransferState.EXPIRED)


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


# ---- events that both ends know ----


@dataclass(frozen=True, slots=True)
class Due:
    """The deadline that the session named has come."""


@dataclass(frozen=True, slots=True)
class Silent:
    """The other end has been silent for the length of the lease."""

    reason: str
