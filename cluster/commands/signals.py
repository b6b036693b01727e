"""Runs a command until Ctrl-C, SIGTERM or SIGHUP; a second signal ends everything at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from cluster.console.progress import Progress

INTERRUPTED = 130


def run_until_stopped(command: Coroutine[Any, Any, int], folder: str, progress: Progress) -> int:
    """Runs `command`, which the first signal cancels: it cleans up and may return its exit code.

    `folder` is that of a Ray which the command starts; whatever happens, nothing of that Ray is left afterwards.
    """
    try:
        return asyncio.run(_run(command, folder, progress))
    finally:
        _end_ray(folder, 1.0)


async def _run(command: Coroutine[Any, Any, int], folder: str, progress: Progress) -> int:
    task = asyncio.ensure_future(command)

    def on_signal() -> None:
        if task.cancelling():
            _end_ray(folder, 0.0)
            progress.say("stopped at once")
            _leave()
        progress.say("stopping; once more to stop at once")
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A closed terminal sends SIGHUP and would end this process alone; `nohup` has it ignored, and means that.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        return await task
    except asyncio.CancelledError:
        # The thread that was starting Ray may wait long for processes that are gone; nobody needs its answer.
        _end_ray(folder, 1.0)
        _leave()
        raise


def _end_ray(folder: str, patience_s: float) -> None:
    if folder:
        from cluster.ray_session.folders import end_local

        end_local(folder, patience_s)


def _leave() -> None:
    with suppress(OSError, ValueError):  # a terminal that is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)
