"""An engine's lower KV tiers, where it has any: takes over what comes from them, and bounds how long a sequence waits. Knows no disk."""

from __future__ import annotations

from collections.abc import Callable

from workers.kv_tiers.tiers import KvTiers
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, State

TIMEOUT_S = 5.0
"""A sequence waits so long for the next block from a slow disk, then computes what has not come."""


class Promotions:
    """Without tiers there is nothing to wait for, and every call returns at once."""

    def __init__(self, tiers: KvTiers | None, scheduler: Scheduler) -> None:
        self._tiers = tiers
        self._scheduler = scheduler
        self._waiting: list[tuple[Sequence, float, int]] = []
        """With the time at which its wait ends unless more blocks have arrived than so many."""

    def begin(self, sequence: Sequence, now: float) -> None:
        """The sequence waits from now on."""
        if self._tiers is not None:
            self._waiting.append((sequence, now + TIMEOUT_S, 0))

    def poll(self, now: float) -> None:
        """Before each step: takes over what has come, and ends waits that took too long."""
        if self._tiers is None:
            return
        self._tiers.poll()
        waiting = self._waiting
        self._waiting = []
        for sequence, by_s, num_before in waiting:
            if sequence.state is not State.PROMOTING:
                continue
            promotion = sequence.table.promotion
            num_now = 0 if promotion is None else promotion.num_arrived
            if num_now > num_before:
                by_s = now + TIMEOUT_S
            elif now >= by_s:
                self._scheduler.give_promotion_up(sequence)
            self._waiting.append((sequence, by_s, num_now))

    @property
    def is_copying(self) -> bool:
        """The next `poll` copies more."""
        return self._tiers is not None and self._tiers.is_copying

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
