"""Counts what a process holds: file descriptors, threads, mapped KV pools; and says what of it is too much. Knows no worker."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections import Counter
from pathlib import Path


def descriptors(pid: int | str = "self") -> Counter[str]:
    """Open file descriptors by kind: "socket", "pipe", "anon_inode:[eventpoll]", a path."""
    found: Counter[str] = Counter()
    folder = Path(f"/proc/{pid}/fd")
    for name in os.listdir(folder):
        try:
            found[re.sub(r":\[\d+\]$", "", os.readlink(folder / name))] += 1
        except FileNotFoundError:
            continue  # the one that listed the folder
    found.pop(f"/proc/{os.getpid()}/fd", None)
    return found


def own_pools(pid: int | str = "self") -> set[int]:
    """Inodes of the KV pools that a process has open: those it owns."""
    pools = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            path = f"/proc/{pid}/fd/{name}"
            if "memfd:baton-kv" in os.readlink(path) and _is_writable(pid, name):
                pools.add(os.stat(path).st_ino)
        except FileNotFoundError:
            continue
    return pools


def _is_writable(pid: int | str, name: str) -> bool:
    """Whether a descriptor is open for writing: peers' pools are not."""
    flags = re.search(r"flags:\s*(\d+)", Path(f"/proc/{pid}/fdinfo/{name}").read_text())
    return flags is not None and int(flags[1], 8) & os.O_ACCMODE == os.O_RDWR


def mapped_pools(pid: int | str = "self") -> set[int]:
    """Inodes of the KV pools in a process's memory, its own and others'."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:baton-kv" in line}


def python_threads() -> Counter[str]:
    """Threads by name, less their numbers."""
    return Counter(re.sub(r"[\d_-]+$", "", thread.name) for thread in threading.enumerate())


def sockets() -> set[str]:
    """Both ends of each socket, for whoever looks for one that was left."""
    found: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    ends = [one.getsockname()]
                    with contextlib.suppress(OSError):
                        ends.append(one.getpeername())
                    found.add(f"{name}: {ends}")
        except OSError:
            continue
    return found


def too_many(now: Counter[str], before: Counter[str]) -> dict[str, int]:
    """What there is more of than before."""
    return dict(now - before)


def shared_memory_names() -> set[str]:
    """Entries of /dev/shm that no living process but this one has in its memory: others' are not our business.

    Nor are the semaphores of multiprocessing, which Baton does not use.
    """
    names = {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if not names:
            break
        if maps.parent.name != str(os.getpid()):
            try:
                names -= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
            except OSError:
                continue  # it has ended, or is somebody else's
    return names


def children(pid: int) -> set[int]:
    """Child processes, zombies too. A child of a thread that ends meanwhile goes to another thread, maybe one already read: the
    census that comes next sees it."""
    found: set[int] = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found |= {int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()}
    return found
