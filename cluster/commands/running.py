"""Runs a command until Ctrl-C, SIGTERM or SIGHUP, and tells the operator meanwhile what becomes of the workers; a second signal ends everything at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import Any, NoReturn

from cluster.commands.flags import INTERRUPTED, OPERATOR_ERROR
from cluster.console.output import StepPrinter, generation_text
from cluster.membership.membership import Registration
from cluster.membership.registration import follow_members
from cluster.ray_session.deaths import RayDied
from cluster.steps import StartFailed
from cluster.store.store import Store
from workers.machine.limits import memory_kills


def run_until_stopped(command: Coroutine[Any, Any, int], folder: str, progress: StepPrinter) -> int:
    """Runs `command`, which the first signal cancels: it cleans up and may return its exit code.

    `folder` is that of a Ray which the command starts; whatever happens, nothing of that Ray is left afterwards.
    """
    try:
        return asyncio.run(_run(command, folder, progress))
    finally:
        _end_ray(folder, 1.0)


async def _run(command: Coroutine[Any, Any, int], folder: str, progress: StepPrinter) -> int:
    task = asyncio.ensure_future(command)

    def on_signal() -> None:
        if task.cancelling():
            _end_ray(folder, 0.0)
            progress.say("stopped at once")
            _leave(INTERRUPTED)
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
        _leave(INTERRUPTED)
    except (RayDied, StartFailed) as error:  # so may threads that ask a Ray which is gone or hangs
        _end_ray(folder, 1.0)
        with suppress(OSError, ValueError):
            print(f"baton: {error}", file=sys.stderr)
        _leave(getattr(error, "exit_code", OPERATOR_ERROR))


def _end_ray(folder: str, patience_s: float) -> None:
    if folder:
        from cluster.ray_session.folders import end_local

        end_local(folder, patience_s)


def _leave(exit_code: int) -> NoReturn:
    with suppress(OSError, ValueError):  # a terminal that is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


async def tell_changes(
    store: Store,
    lease_ttl_s: float,
    progress: StepPrinter,
    announce: Callable[[], None],
    only: str | None = None,
    on_members: Callable[[frozenset[str]], None] = lambda _: None,
) -> None:
    """One line for each worker (or only that one) that goes, comes back or changes its role; until cancelled.

    `announce` says that all is up, once it is known what is there: whatever changes after that is told. `on_members` is told all
    names, then and after each change.
    """
    kills = memory_kills()
    async with aclosing(follow_members(store, lease_ttl_s)) as changes:
        known = _by_name(await anext(changes))
        on_members(frozenset(known))
        announce()
        async for workers in changes:
            now = _by_name(workers)
            for worker_id in sorted(now.keys() | known.keys()):
                line = describe(worker_id, known.get(worker_id), now.get(worker_id))
                if line and only in (None, worker_id):
                    progress.say(line)
            known = now
            on_members(frozenset(now))
            if (killed_now := memory_kills()) > kills:
                progress.say(
                    "the kernel has ended a process here for want of memory; lower worker.kv_memory_bytes, or start fewer workers"
                )
                kills = killed_now


def _by_name(workers: Iterable[Registration]) -> dict[str, Registration]:
    return {worker.address.worker_id: worker for worker in workers}


def describe(worker_id: str, before: Registration | None, after: Registration | None) -> str:
    """What became of a worker; empty when nothing did."""
    if after is None:
        return f"{worker_id} is gone"
    generation = generation_text(after.address.generation)
    if before is None:
        return f"{worker_id} is there: {after.role}, generation {generation}"
    if before.role != after.role:
        return f"{worker_id} switched from {before.role} to {after.role}, generation {generation}"
    if before.address != after.address:
        return f"{worker_id} was started again: {after.role}, generation {generation}"
    return ""
