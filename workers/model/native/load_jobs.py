"""Runs the many small jobs of a load on several threads; knows neither weights nor files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_MAX_THREADS = 8
"""More wait for memory, and each holds a piece of its own."""


def run_all(jobs: Sequence[Callable[[], None]], num_threads: int) -> None:
    """Returns when all are done. Raises what the first one that failed raised; what has not begun by then never does.

    The threads run on the processors of the calling one.
    """
    if num_threads == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(min(num_threads, _MAX_THREADS), "load", torch.set_num_threads, (1,)) as threads:
        running = [threads.submit(job) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
