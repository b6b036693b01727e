"""Runs the requests of one job together: submits all or none, reads their outputs at once, and always closes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from router.backend import Backend, OutputStream
from workers.request import Output, Request

T = TypeVar("T")

_SUBMITS_AT_ONCE = 8
"""Each takes the event loop for some 0.2 ms."""


class Generation:
    """The output streams of one job. What is not read waits in the streams, which bound it. Used by one task."""

    def __init__(self, streams: list[OutputStream], heartbeat_s: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams = streams
        self._wakes = [partial(self._wake, place) for place in range(len(streams))]
        self._ready = list(range(len(streams)))
        """Streams that may have something."""
        self._reader: asyncio.Future[None] | None = None
        self._heartbeat_s = heartbeat_s
        self._written_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.is_heartbeat_due = False
        """Nothing was written for as long as a heartbeat's interval."""
        self._watch_silence()

    @classmethod
    async def open(
        cls, backend: Backend, requests: tuple[Request, ...], heartbeat_s: float | None = None
    ) -> Generation:
        """Submits every request; when one is refused, those before it are closed and the refusal is raised.

        Others have a turn between a few of them: a job may have thousands.
        """
        streams: list[OutputStream] = []
        try:
            for number, request in enumerate(requests, 1):
                streams.append(backend.submit(request))
                if number % _SUBMITS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(streams, heartbeat_s)

    async def next_batch(self) -> list[tuple[int, Output]]:
        """Waits for an output, then takes all there are; empty when only a heartbeat is due. Raises a stream's failure."""
        while True:
            batch: list[tuple[int, Output]] = []
            if self._ready:
                ready, self._ready = self._ready, []
                for place in ready:
                    output = self._streams[place].take(self._wakes[place])
                    if output is not None:
                        batch.append((place, output))
            if batch or self.is_heartbeat_due:
                return batch
            self._reader = self._loop.create_future()
            await self._reader

    def wrote(self) -> None:
        """Something has gone out to the client: silence begins anew. An output that shows nothing does not end it."""
        self.is_heartbeat_due = False
        self._written_s = self._loop.time()

    def close(self) -> None:
        """Closes every stream; once is enough."""
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams:
            stream.close()

    def _wake(self, place: int) -> None:
        self._ready.append(place)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _watch_silence(self) -> None:
        """One timer per interval and job, not per output: it only looks when something was last written."""
        if self._heartbeat_s is None:
            return
        left_s = self._written_s + self._heartbeat_s - self._loop.time()
        if left_s <= 0:
            self.is_heartbeat_due = True
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)
            left_s = self._heartbeat_s
        self._timer = self._loop.call_later(left_s, self._watch_silence)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T], is_sent: Callable[[], bool]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away. Raises ClientDisconnect then.

    Servers report a disconnect also when an answer is complete: with `is_sent` true the work may end in peace.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not is_sent():
            raise ClientDisconnect
        return await task
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
