"""Looks who listens at a port of this host (on Linux, from /proc); judges nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.ray_session.session import port_is_free

_LISTENS = "0A"
"""Of a socket in /proc/net/tcp."""


@dataclass(frozen=True, slots=True)
class Process:
    """`name`: of its program; its arguments, which may hold secrets, are not read out."""

    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class PortFacts:
    """`error`: why nobody could listen at this host's address. `is_taken`: somebody does; `takers`: those that this user may see."""

    setting: str
    port: int
    is_free: bool
    error: str = ""
    is_taken: bool = False
    takers: tuple[Process, ...] = ()


def look_at_port(setting: str, host: str, port: int) -> PortFacts:
    try:
        if port_is_free(host, port):
            return PortFacts(setting, port, is_free=True)
    except OSError as error:
        return PortFacts(setting, port, is_free=False, error=f"{host!r} is not an address of this host ({error})")
    sockets = _sockets_at(port)
    return PortFacts(setting, port, is_free=False, is_taken=bool(sockets), takers=_holders(sockets))


def _sockets_at(port: int) -> set[str]:
    """The inodes of sockets that listen at a port, at whatever address."""
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


def _holders(sockets: set[str]) -> tuple[Process, ...]:
    """Processes that have one of these sockets, by process number."""
    wanted = {f"socket:[{inode}]" for inode in sockets}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(_target(each) in wanted for each in os.scandir(folder / "fd")):
                found.append(Process(int(folder.name), program_name((folder / "cmdline").read_bytes())))
    return tuple(sorted(found, key=lambda each: each.pid))


def _target(entry: os.DirEntry[str]) -> str:
    """Empty: it has been closed meanwhile."""
    with suppress(OSError):
        return os.readlink(entry.path)
    return ""


def program_name(command_line: bytes) -> str:
    """From /proc/PID/cmdline: of a Python program the script's or module's name; of Ray's actors their title."""
    words = [word.decode(errors="replace") for word in command_line.split(b"\0")]
    if words[0].startswith("ray::"):
        return words[0].strip()
    name = Path(words[0]).name
    if name.startswith("python") and len(words) > 2:
        is_module = words[1] == "-m"
        return words[2].partition(".")[0] if is_module else Path(words[1]).name or name
    return name
