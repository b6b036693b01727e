"""An engine's lower KV tiers, where it has any: takes over what comes from them, and bounds how long a sequence waits. Knows no disk."""

from __future__ import annotations

from collections.abc import Callable

from workers.kv_tiers.tiers import KvTiers
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, State

TIMEOUT_S = 5.0
"""A sequence waits so long for a slow disk, then computes what has not come."""


class Promotions:
    """Without tiers there is nothing to wait for, and every call returns at once."""

    def __init__(self, tiers: KvTiers | None, scheduler: Scheduler) -> None:
        self._tiers = tiers
        self._scheduler = scheduler
        self._waiting: list[tuple[Sequence, float]] = []
        """With the time at which its wait ends."""

    def begin(self, sequence: Sequence, now: float) -> None:
        """The sequence waits from now on."""
        if self._tiers is not None:
            self._waiting.append((sequence, now + TIMEOUT_S))

    def poll(self, now: float) -> None:
        """Before each step: takes over what has come, and ends waits that took too long."""
        if self._tiers is None:
            return
        self._tiers.poll()
        self._waiting = [(sequence, by_s) for sequence, by_s in self._waiting if sequence.state is State.PROMOTING]
        for sequence, by_s in self._waiting:
            if now >= by_s:
                self._scheduler.give_promotion_up(sequence)

    def on_ready(self, notify: Callable[[], None]) -> None:
        """`notify` is called, on another thread, when `poll` would find something new."""
        if self._tiers is not None:
            self._tiers.on_result(notify)

    def wait(self, timeout_s: float) -> None:
        """Returns when `poll` would find something new, or nothing is on its way, or after so long."""
        if self._tiers is not None:
            self._tiers.wait(timeout_s)

    def counters(self) -> tuple[tuple[str, float], ...]:
        return () if self._tiers is None else self._tiers.counters()

    def close(self) -> None:
        if self._tiers is not None:
            self._tiers.close()
