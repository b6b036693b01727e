"""Keeps one core busy, as another program on the machine would, while engines are measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WORK = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that computes on the last core of those allowed here, and on no other, at the usual priority."""
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", _WORK, str(core)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()
