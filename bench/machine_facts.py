"""What the machine is, and how much of it other programs used meanwhile; reads /proc only."""

from __future__ import annotations

import os
import resource
import time
from datetime import date
from pathlib import Path
from typing import Any


def machine_facts() -> dict[str, Any]:
    return {"date": date.today().isoformat(), "cpu": _cpu_name(), "num_cores": len(os.sched_getaffinity(0))}


class ForeignLoad:
    """The share of all cores' time that programs other than this one and its ended children used since it was made."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._busy_s, self._own_s = _busy_s(), _own_s()

    def share(self) -> float:
        """Call it after all children have ended: the system counts a child's time when it ends."""
        foreign_s = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return max(0.0, foreign_s) / ((time.monotonic() - self._started_s) * (os.cpu_count() or 1))


def _busy_s() -> float:
    """Seconds that all cores together have worked, or were withheld by the hypervisor (steal)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"
