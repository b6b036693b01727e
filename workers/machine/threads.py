"""Pools whose threads all run from their making: a host that starts no more threads later takes nothing from them. Knows no work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

NUM_HELPERS = 8
"""Of an event loop, for what would hold it up."""


def started_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool starts a thread when work comes and none is free; this one has started all. Raises RuntimeError when the host cannot."""
    pool, all_run = ThreadPoolExecutor(count, name), threading.Barrier(count)
    try:
        for waiting in [pool.submit(all_run.wait) for _ in range(count)]:
            waiting.result()
    except BaseException:
        all_run.abort()
        pool.shutdown(wait=False)
        raise
    return pool
