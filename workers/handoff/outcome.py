"""How a handoff ended at its receiver; plain values, knows no stream."""

from __future__ import annotations

from dataclasses import dataclass

from workers.errors import Refusal, TransferFailed
from workers.handoff.protocol.messages import Done


@dataclass(frozen=True, slots=True)
class Handoff:
    """What landed. Times are measured at the receiver: `wait_s` from opening to the first announcement, `transfer_s` while
    pieces were on their way or being verified, `exposed_s` from the done message to the last piece in its place."""

    done: Done
    transport: str
    kv_bytes: int
    transfer_s: float
    wait_s: float = 0.0
    exposed_s: float = 0.0
    resends: int = 0
    degradations: int = 0


class HandoffFailed(TransferFailed):
    """A transfer that did not land; `refusal` names why, the counts what was tried."""

    def __init__(self, reason: str, refusal: Refusal, resends: int = 0, degradations: int = 0) -> None:
        super().__init__(reason)
        self.refusal = refusal
        self.resends = resends
        self.degradations = degradations
