"""What this process may use of its host: memory, processors and open files, by the kernel's account and its container's limits.

The one reader of control groups, version 1 and 2. A process is under the limits of its own group and of every group
above it; where a container hides the groups above, the one that it shows at the top of the file system counts.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def available_bytes(root: Path = _ROOT) -> int:
    """Memory that could be used now: what the kernel thinks available, or less where a group leaves less.

    Of what a group holds, file pages that were not used lately count as free, as the kernel gives them up first.
    """
    found = [_host_bytes(root)]
    for group in _groups(root, "memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # not of this version, or "max"
                left = int((group / limit).read_text()) - int((group / used).read_text())
                found.append(left + _fields(group / "memory.stat").get(cached, 0))
    return max(0, min(found))


def usable_cpus(root: Path = _ROOT) -> int:
    """Processors that this process can keep busy at once: those it may run on, or fewer where a group has a quota."""
    found = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for group in _groups(root, "cpu"):
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))  # "max" raises: no quota
        with suppress(OSError, ValueError):
            quota_us = int((group / "cpu.cfs_quota_us").read_text())  # -1: none
            if quota_us > 0:
                found.append(quota_us / int((group / "cpu.cfs_period_us").read_text()))
    return max(1, math.ceil(min(found)))


def memory_kills(root: Path = _ROOT) -> int:
    """How many processes the kernel has ended for want of memory: of this process's group, or else of the host."""
    for group in _groups(root, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            count = _fields(group / name).get("oom_kill")
            if count is not None:
                return count
    return _fields(root / "proc/vmstat").get("oom_kill", 0)


def raise_file_limit() -> int:
    """Lets this process, and those that it starts, open as many files as it may; returns how many. Every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # some systems show a hard limit above what they allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _host_bytes(root: Path) -> int:
    available_kib = _fields(root / "proc/meminfo").get("MemAvailable:")
    if available_kib is not None:
        return available_kib * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups that may hold the controller's files, its own first, then those above."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounts = (top, top / "unified") if not controllers else (top / controller, top / controllers)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            folder = mount / path.strip("/")
            while folder != mount:
                yield folder
                folder = folder.parent
            yield mount


def _fields(path: Path) -> dict[str, int]:
    """The lines "name number" of a file; empty when it cannot be read."""
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) >= 2 and pair[1].lstrip("-").isdigit()}
