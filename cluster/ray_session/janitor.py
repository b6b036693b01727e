"""Cleans up after a process that keeps a cluster and is killed: ends what is left of its Ray, and removes its folder.

The janitor is a process of its own that sleeps until the other end of a pipe closes, which the kernel does however its owner
dies. An owner that cleans up by itself ends the janitor as one of the cluster's processes.
"""

from __future__ import annotations

import select
import subprocess
import sys

from cluster.ray_session import processes
from cluster.ray_session.defaults import own_paths
from cluster.ray_session.folders import end_local

_PATIENCE_S = 1.0
_LOOK_S = 2.0


def engage(folder: str) -> subprocess.Popen[bytes]:
    """Starts the janitor of this process's folder. It must be held for as long as the folder is needed."""
    code = (
        f"import sys; sys.path[:0] = {own_paths()!r}; from cluster.ray_session.janitor import main; main(sys.argv[1])"
    )
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what ends its owner's session spares it
        cwd="/",
    )


def dismiss(janitor: subprocess.Popen[bytes]) -> None:
    """The folder is gone: the janitor, should it still be there, finds nothing to do."""
    if janitor.stdin is not None:
        janitor.stdin.close()
    janitor.wait()


def main(folder: str) -> None:
    """Ray's node process dies with the owner. Its agents would outlive it by a minute, nameless and nobody's children: they are
    known from the last look while it lived."""
    members: tuple[processes.Process, ...] = ()
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        members = processes.family(folder)
    end_local(folder, _PATIENCE_S, members)
