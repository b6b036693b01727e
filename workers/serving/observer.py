"""What the worker core tells whoever keeps an account of requests; nothing that is told decides anything."""

from __future__ import annotations

from typing import Protocol

from workers.engine.messages import Prefilled
from workers.handoff.protocol.choices import RecoveryChoice
from workers.handoff.protocol.messages import Handoff, HandoffFailed
from workers.request import Output


class Observer(Protocol):
    """Hears of requests and prompts by their sequence ids. A traceparent names what is to hang together; `now` is the core's."""

    def submitted(self, sequence_id: int, traceparent: str, now: float) -> None: ...

    def said(self, sequence_id: int, output: Output, now: float) -> None:
        """Also of sequences that nobody submitted."""
        ...

    def cancelled(self, sequence_id: int) -> None: ...

    def handoff_begun(self, sequence_id: int, traceparent: str, source: str, attempt: int) -> str:
        """A prompt is asked for elsewhere; returns the traceparent that goes with it."""
        ...

    def handoff_ended(
        self, sequence_id: int, outcome: Handoff | HandoffFailed | None, choice: RecoveryChoice | None
    ) -> None:
        """With how a failure is answered."""
        ...

    def prefill_begun(self, sequence_id: int, traceparent: str) -> None:
        """A prompt is computed for another worker."""
        ...

    def prefill_computed(self, prefilled: Prefilled) -> None: ...

    def prefill_ended(self, sequence_id: int, reason: str) -> None: ...


class Unobserved:
    """Nobody keeps account."""

    def submitted(self, sequence_id: int, traceparent: str, now: float) -> None:
        pass

    def said(self, sequence_id: int, output: Output, now: float) -> None:
        pass

    def cancelled(self, sequence_id: int) -> None:
        pass

    def handoff_begun(self, sequence_id: int, traceparent: str, source: str, attempt: int) -> str:
        return traceparent

    def handoff_ended(
        self, sequence_id: int, outcome: Handoff | HandoffFailed | None, choice: RecoveryChoice | None
    ) -> None:
        pass

    def prefill_begun(self, sequence_id: int, traceparent: str) -> None:
        pass

    def prefill_computed(self, prefilled: Prefilled) -> None:
        pass

    def prefill_ended(self, sequence_id: int, reason: str) -> None:
        pass
