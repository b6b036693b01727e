"""The temporary folders that local clusters keep Ray's files and sockets in: made, removed with their processes, found when left behind.

The process that has made a folder holds a lock on a file in it. The kernel releases it however the process ends, so a lock that
can be taken marks a folder whose owner is dead, also across containers that share the folder, and after a restart of the host.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from cluster.ray_session import processes

_PREFIX = "baton-"
_OWNER = "owner"
_held: dict[str, int] = {}
"""The locks' descriptors by folder."""


def make_folder() -> str:
    """A new temporary folder for Ray's files. Its name is short: the path of a socket in it has at most 107 characters."""
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_parent())
    owner = Path(folder, _OWNER)
    # Locked under another name first: others would take the lock of a file that they can see and nobody holds.
    coming = owner.with_suffix(".new")
    descriptor = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _held[folder] = descriptor
    coming.rename(owner)
    return folder


def end_local(
    folder: str, patience_s: float, members: tuple[processes.Process, ...] = ()
) -> tuple[processes.Process, ...]:
    """Ends every process of the Ray whose files are in `folder`, then removes the folder; returns what would not end."""
    known = {(process.pid, process.started): process for process in (*members, *processes.family(folder))}
    left = processes.end(tuple(known.values()), patience_s)
    # A process that was just being started when the others were listed.
    left += processes.end(processes.family(folder), patience_s)
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _held:
        os.close(_held.pop(folder))
    return left


def remove_stale() -> tuple[str, ...]:
    """Removes the folders that dead owners have left, with what still runs there; returns them. Those of other users stay."""
    removed = []
    for folder in sorted(Path(_parent()).glob(f"{_PREFIX}*")):
        with suppress(OSError):  # no such file, another user's, or locked: its owner lives
            descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end_local(str(folder), 1.0)
                removed.append(str(folder))
            finally:
                os.close(descriptor)
    return tuple(removed)


def _parent() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 30 else "/tmp"
