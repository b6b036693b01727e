"""The folders that local clusters keep their files and sockets in: made, removed with their processes, found when left behind.

Nobody else can enter such a folder, so what Ray leaves open to all in its part of it, or a compiler in its temporary one, is safe.

The process that has made a folder holds a lock on a file in it. The kernel releases it however the process ends, so a lock that
can be taken marks a folder whose owner is dead, also across containers that share the folder, and after a restart of the host.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from cluster.ray_session import processes
from cluster.secret_files import make_secret

_PREFIX = "baton-"
_OWNER = "owner"
_MAX_PARENT = 20
"""Characters; the path of a socket has at most 107, of which Ray's part of it and ours take the rest."""
_held: dict[str, int] = {}
"""The locks' descriptors by folder."""


def make_folder() -> str:
    """A new folder that only this user can enter, and this process owns, with new secrets in it."""
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_parent())
    for inner in (ray_folder(folder), scratch_folder(folder)):
        os.mkdir(inner, 0o700)
    for secret in (token_file(folder), secret_file(folder)):
        make_secret(secret)
    owner = Path(folder, _OWNER)
    # Locked under another name first: others would take the lock of a file that they can see and nobody holds.
    coming = owner.with_suffix(".new")
    descriptor = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _held[folder] = descriptor
    coming.rename(owner)
    return folder


def ray_folder(folder: str) -> str:
    """Ray's own files, which Ray lets everybody read and write."""
    return f"{folder}/ray"


def scratch_folder(folder: str) -> str:
    """The temporary folder (TMPDIR) of the cluster's processes."""
    return f"{folder}/tmp"


def token_file(folder: str) -> str:
    """What a client of this Ray must show: see cluster.ray_session.auth."""
    return f"{folder}/ray-token"


def secret_file(folder: str) -> str:
    """What the cluster's entries in Redis are signed with, unless store.secret_file names another."""
    return f"{folder}/cluster-secret"


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
    for folder in _folders():
        with suppress(OSError):  # no such file, or locked: its owner lives
            descriptor = os.open(f"{folder}/{_OWNER}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end_local(folder, 1.0)
                removed.append(folder)
            finally:
                os.close(descriptor)
    return tuple(removed)


def living() -> tuple[str, ...]:
    """The folders of this user's clusters whose owners live."""
    found = []
    for folder in _folders():
        with suppress(OSError):
            descriptor = os.open(f"{folder}/{_OWNER}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(folder)
            finally:
                os.close(descriptor)
    return tuple(found)


def _folders() -> list[str]:
    """All that look like ours, belong to this user and are closed to others: names in a shared folder prove nothing."""
    found = []
    for folder in sorted(Path(_parent()).glob(f"{_PREFIX}*")):
        with suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                found.append(str(folder))
    return found


def _parent() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _MAX_PARENT else "/tmp"
