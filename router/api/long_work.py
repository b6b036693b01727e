"""Threads for what long requests and long answers cost, a few for all of them: whoever comes with more of it waits for his kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 2
"""A long prompt takes tens of times its own size in memory while it is tokenized."""

_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="long-request")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns or raises. It must let go of the interpreter's lock every few milliseconds, as Python code does."""
    return await asyncio.get_running_loop().run_in_executor(_threads, lambda: work(*args, **kwargs))
