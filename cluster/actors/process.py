"""What every actor of a cluster is as a process: its logs, threads and limits, how its content starts, and when it ends itself."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from cluster.config import LogConfig
from cluster.logs import write_logs
from cluster.membership.membership import Superseded
from cluster.store.store import StoreUnavailable
from workers.machine.limits import raise_file_limit
from workers.machine.threads import NUM_HELPERS, started_threads

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_START_S = 5.0
"""A start that failed is told to whoever waits in ready(), and after this long tried again in a new process."""


class Actor(ABC):
    """Starts its content from the constructor, because that is all that Ray runs again after a crash.

    A content whose thread (its name starts with one of `vital_thread`) dies is a crash too: the process ends and Ray starts it anew.
    """

    vital_thread: tuple[str, ...] = ()

    def __init__(self, name: str, log_config: LogConfig | None = None) -> None:
        self._name = name
        write_logs(log_config or LogConfig(), name)
        asyncio.get_running_loop().set_default_executor(started_threads(NUM_HELPERS, "helper"))
        raise_file_limit()  # each stream is a file, and a Ray that others have started may have left it low
        threading.excepthook = self._on_thread_died
        self._stopping = False
        self._traces: Any = None
        self._started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._life = asyncio.get_running_loop().create_task(self._live())

    def __repr__(self) -> str:
        return self._name

    async def ready(self) -> str:
        """Waits for the start; returns the address. Raises what the start raised."""
        return await asyncio.shield(self._started)

    async def pid(self) -> int:
        return os.getpid()

    async def _live(self) -> None:
        try:
            await self._run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            log.exception("%s failed", self._name)
            if not self._started.done():
                self._started.set_exception(error)
                await asyncio.sleep(RETRY_START_S)
            if isinstance(error, Superseded):
                leave_for_good()
            elif not self._stopping:
                os._exit(1)  # Ray starts the actor again, in a clean process

    def _on_thread_died(self, args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else ""
        log.critical("%s: thread %s died", self._name, name, exc_info=args.exc_value)
        if name.startswith(self.vital_thread) and not self._stopping:
            os._exit(1)

    @abstractmethod
    async def _run(self) -> None:
        """Starts the content, tells `_started`, and runs for as long as the actor lives."""

    def _export_traces(self, endpoint: str, service: str) -> None:
        """Spans of this process go to the collector, where there is one. Raises InvalidConfig."""
        if endpoint:
            self._traces = importlib.import_module("workers.trace_export").TraceExport(endpoint, service, self._name)

    async def _send_last_traces(self) -> None:
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def _end(self, *steps: Awaitable[object]) -> None:
        self._stopping = True
        self._life.cancel()
        for step in steps:
            with suppress(Exception):
                await step


async def insist(attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Repeats what the store's absence defeats, for up to a minute; a starting cluster's Redis may be slower than we."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            return await attempt()
        except StoreUnavailable:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(0.5)


def leave_for_good() -> None:
    """Ends this actor without a restart, which would only push the newer one out in turn."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
