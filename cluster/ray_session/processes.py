"""Finds and ends processes of this host that a Ray start left behind; reads /proc and signals single ids, never a name."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers.errors import InvariantViolated


@dataclass(frozen=True, slots=True)
class Process:
    """A process and its start time in clock ticks: an id alone may be given to a stranger later."""

    pid: int
    parent: int
    started: int
    command: str


def snapshot() -> dict[int, Process]:
    """All visible processes by id. Empty where there is no /proc."""
    found: dict[int, Process] = {}
    with suppress(FileNotFoundError):
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and (process := read_process(int(entry.name))):
                found[process.pid] = process
    return found


def read_process(pid: int) -> Process | None:
    """None when there is no such process, or only its zombie."""
    try:
        # The name, in parentheses, may hold anything; the fields are counted behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, ValueError):
        return None
    return None if fields[0] == "Z" else Process(pid, int(fields[1]), int(fields[19]), command.strip())


def family(marker: str) -> tuple[Process, ...]:
    """Processes whose command line names `marker` (a folder of ours), and all their descendants; never this process.

    Raises InvariantViolated for what is no such folder: every command line has an empty text in it, and most have a slash.
    """
    if not marker.startswith("/") or len(Path(marker).parts) < 3:
        raise InvariantViolated(f"{marker!r} is no folder whose processes may be looked for")
    everything = snapshot()
    members = {process.pid for process in everything.values() if marker in process.command}
    members.discard(os.getpid())
    grown = True
    while grown:
        children = {process.pid for process in everything.values() if process.parent in members}
        grown = not children <= members
        members |= children
    members.discard(os.getpid())
    return tuple(everything[pid] for pid in sorted(members))


def alive(processes: tuple[Process, ...]) -> tuple[Process, ...]:
    """Those still running; a reused id does not count."""
    return tuple(
        process for process in processes if (now := read_process(process.pid)) and now.started == process.started
    )


def end(processes: tuple[Process, ...], patience_s: float) -> tuple[Process, ...]:
    """Asks the processes to end, kills those that have not after `patience_s`; returns those that even so remain."""
    for process in alive(processes):
        _signal(process.pid, signal.SIGTERM)
    if _wait_gone(processes, patience_s):
        return ()
    for process in alive(processes):
        _signal(process.pid, signal.SIGKILL)
    _wait_gone(processes, 5.0)
    return alive(processes)


def _wait_gone(processes: tuple[Process, ...], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while alive(processes):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
