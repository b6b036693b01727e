"""Says whether this host, or this container, runs out of memory, so that what needs much of it can be left out until there is enough again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from workers.machine.limits import available_bytes

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks: the kernel's account is read from files."""
ENOUGH = 1.5
"""There is enough again where so many times the least is available."""


class MemoryWatch:
    """`what` is done without while less than `least_bytes` are available, as its begin and its end in the log say; 0: it never is."""

    def __init__(
        self,
        what: str,
        least_bytes: int,
        available: Callable[[], int] = available_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._least_bytes = least_bytes
        self._available = available
        self._clock = clock
        self._looked_s = float("-inf")
        self._is_short = False

    @property
    def is_short(self) -> bool:
        """As it was at most LOOK_S ago."""
        now = self._clock()
        if self._least_bytes and now >= self._looked_s + LOOK_S:
            self._looked_s = now
            self._look(self._available())
        return self._is_short

    def _look(self, available: int) -> None:
        if not self._is_short and available < self._least_bytes:
            self._is_short = True
            log.warning("memory is short (%d MiB available): %s", available >> 20, self._what)
        elif self._is_short and available >= ENOUGH * self._least_bytes:
            self._is_short = False
            log.warning("there is enough memory again (%d MiB available)", available >> 20)
