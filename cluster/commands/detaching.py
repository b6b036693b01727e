"""`baton serve --detach`: the cluster is kept by a process without a terminal, which the command leaves behind once it serves."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Detached:
    """The end of the process that is to stay: `serves` lets go of the terminal."""

    pipe: int

    def serves(self, log: Path) -> None:
        """From here on what is said goes to `log`, a new file that only this user reads; the command returns."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            log.unlink()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(nothing, 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(nothing)
        os.close(file)
        os.write(self.pipe, b"1")
        os.close(self.pipe)


def detach() -> Detached | int:
    """Goes on in a new process, in a session of its own. In the old one it returns the exit code, as soon as the new one serves
    or has ended; call it before anything starts a thread.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        return Detached(writing)
    os.close(writing)
    while True:
        try:
            said = os.read(reading, 1)
            break
        except KeyboardInterrupt:
            os.kill(child, signal.SIGINT)  # its terminal is not this one any more
    if said:
        return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1


def log_file(port: int) -> Path:
    """Where a detached cluster writes what it would say: one file for each port."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "baton" / f"serve-{port}.log"
