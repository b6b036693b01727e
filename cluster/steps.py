"""Steps of a start: each has a bound, many at once have one as well, and what others must have started first is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from cluster.console.output import StepPrinter
from workers.errors import BatonError

T = TypeVar("T")

AT_ONCE = 16
"""Actors that are placed, and entries of the store that are written, at the same time."""
AGAIN_S = 0.5
"""Between two attempts at what others must have started."""


class StartFailed(BatonError):
    """A step of the start failed or hung; the message says which one and what to do."""


async def all_of(jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Does all of them, AT_ONCE at a time. The first failure is raised, but not before every job has ended: what the others
    made is known then, and can be taken down.
    """
    free = asyncio.Semaphore(AT_ONCE)

    async def one(job: Coroutine[Any, Any, None]) -> None:
        async with free:
            await job

    for end in await asyncio.gather(*(one(job) for job in jobs), return_exceptions=True):
        if isinstance(end, BaseException):
            raise end


async def bounded(work: Awaitable[T], timeout_s: float, what: str) -> T:
    """Raises StartFailed with `what` when the work takes too long."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise StartFailed(f"{what} within {timeout_s:g} s (start_timeout_s sets the limit)") from None


async def patiently(attempt: Callable[[], Awaitable[object]], timeout_s: float, progress: StepPrinter) -> None:
    """Repeats what fails because others are still starting, as containers of one deployment do, and says why it waits. After
    `timeout_s` it raises what the last attempt raised.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    said = ""
    while True:
        try:
            await attempt()
            return
        except BatonError as error:
            if asyncio.get_running_loop().time() >= deadline:
                raise
            if str(error) != said:
                said = str(error)
                progress.say(f"  not yet: {said}")
        await asyncio.sleep(AGAIN_S)
