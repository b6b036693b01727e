"""Where the work of a request is done, by its size: on the event loop, in a thread, or in one of the few that huge ones share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

HUGE_BYTES = 256 << 10
NUM_HUGE = 2
"""Huge requests that are read at once: a prompt takes tens of times its own size while it is tokenized."""

_huge = ThreadPoolExecutor(NUM_HUGE, thread_name_prefix="huge-request")


async def offload(work: Callable[[], T], num_bytes: int, inline_bytes: int) -> T:
    """What `work` on a request of so many bytes returns or raises; up to `inline_bytes` it is done here and now.

    In a thread it must let go of the interpreter's lock every few milliseconds, as Python code and tokenizers do.
    """
    if num_bytes <= inline_bytes:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_huge if num_bytes > HUGE_BYTES else None, work)
