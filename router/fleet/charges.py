"""Remembers what was just sent to a worker and cannot be in its reported load yet, so that a burst does not herd on one worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Charge:
    """The load that one request adds to one worker; `sent_s` is when it was sent."""

    sent_s: float
    num_sequences: int = 0
    num_blocks: int = 0
    prefill_tokens: int = 0


class Charges:
    """The open charges of one worker, oldest first, with their sums.

    Prompts are owed for longer than a report takes to contain them: until the first token has come.
    """

    def __init__(self, settle_s: float) -> None:
        """A load report that arrives `settle_s` after a request was sent is taken to contain it."""
        self._settle_s = settle_s
        self._open: dict[str, Charge] = {}
        self.num_sequences = 0
        self.num_blocks = 0
        self.prefill_tokens = 0
        self._owed: dict[str, int] = {}
        self.owed_tokens = 0
        """Prompt tokens of requests that were sent there to be computed, and that have no token yet."""

    def __len__(self) -> int:
        return len(self._open) + len(self._owed)

    def add(self, wire_id: str, charge: Charge) -> None:
        self.release(wire_id)
        self._open[wire_id] = charge
        self.num_sequences += charge.num_sequences
        self.num_blocks += charge.num_blocks
        self.prefill_tokens += charge.prefill_tokens
        if charge.prefill_tokens:
            self._owed[wire_id] = charge.prefill_tokens
            self.owed_tokens += charge.prefill_tokens

    def release(self, wire_id: str) -> None:
        """The request ended, or its outputs show that the worker knows it."""
        self._settle(wire_id)
        self.owed_tokens -= self._owed.pop(wire_id, 0)

    def _settle(self, wire_id: str) -> None:
        charge = self._open.pop(wire_id, None)
        if charge is not None:
            self.num_sequences -= charge.num_sequences
            self.num_blocks -= charge.num_blocks
            self.prefill_tokens -= charge.prefill_tokens

    def settle(self, now: float) -> bool:
        """A load report arrived. True: it contains what was charged until now."""
        has_settled = False
        while self._open:
            wire_id, oldest = next(iter(self._open.items()))
            if now - oldest.sent_s < self._settle_s:
                break
            self._settle(wire_id)
            has_settled = True
        return has_settled

    def clear(self) -> None:
        for wire_id in [*self._open, *self._owed]:
            self.release(wire_id)
