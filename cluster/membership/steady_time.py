"""The time of day as a host's clock would show it had nobody set that since: starts of workers are numbered by it.

A clock that is set back while a worker and the store of its cluster die together would otherwise give a start a number that was there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SteadyTime:
    """Holds for the host that made it, until that is started again; elsewhere it is the time of day."""

    boot_id: str
    offset_s: float

    @staticmethod
    def here() -> SteadyTime:
        return SteadyTime(_boot_id(), time.time() - _since_boot_s())

    def now_s(self, wall: Callable[[], float] = time.time) -> float:
        """Seconds since 1970."""
        return self.offset_s + _since_boot_s() if self.boot_id and self.boot_id == _boot_id() else wall()


def _boot_id() -> str:
    """A name of this run of the kernel; empty where there is none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
