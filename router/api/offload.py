"""Has work on large requests done in threads, so that streams do not stall; knows nothing of what it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from workers.errors import Refusal, Refused

T = TypeVar("T")

HUGE_BYTES = 256 << 10
NUM_HUGE = 2
"""Huge requests that are read at once: a prompt takes tens of times its own size while it is tokenized."""

_huge = ThreadPoolExecutor(NUM_HUGE, thread_name_prefix="huge-request")
_log = logging.getLogger(__name__)


async def offload(work: Callable[[], T], num_bytes: int, inline_bytes: int) -> T:
    """What `work` on a request of so many bytes returns or raises; up to `inline_bytes` it is done here and now.

    In a thread it must let go of the interpreter's lock every few milliseconds, as Python code and tokenizers do.
    """
    if num_bytes <= inline_bytes:
        return work()
    try:
        done = asyncio.get_running_loop().run_in_executor(_huge if num_bytes > HUGE_BYTES else None, work)
    except RuntimeError as error:
        _log.warning("this host starts no more threads (%s): requests that need one are refused", error)
        raise Refused(
            Refusal.QUEUE_FULL, "this host is too busy for a request of this size", retry_after_s=1.0
        ) from None
    return await done
