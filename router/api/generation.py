"""Runs the requests of one job together: submits all or none, reads their outputs at once, and always closes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from router.backend import Backend, OutputStream
from workers.errors import InvariantViolated
from workers.request import Output, Request

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Generation:
    """The output streams of one job, read concurrently into one bounded queue."""

    def __init__(self, streams: list[OutputStream], max_pending: int, heartbeat_s: float | None) -> None:
        self._streams = streams
        self._queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue(max_pending)
        self._failure: Exception | None = None
        self._pumps = [asyncio.create_task(self._pump(place, stream)) for place, stream in enumerate(streams)]
        self._heartbeat_s = heartbeat_s
        self._written_s = asyncio.get_running_loop().time()
        self._timer: asyncio.TimerHandle | None = None
        self.is_heartbeat_due = False
        """Nothing was written for as long as a heartbeat's interval."""
        self._watch_silence()

    @classmethod
    async def open(
        cls, backend: Backend, requests: tuple[Request, ...], max_pending: int, heartbeat_s: float | None = None
    ) -> Generation:
        """Submits every request; when one is refused, those before it are closed and the refusal is raised."""
        streams: list[OutputStream] = []
        try:
            for request in requests:
                streams.append(backend.submit(request))
        except BaseException:
            await asyncio.shield(_close(streams))
            raise
        return cls(streams, max_pending, heartbeat_s)

    async def next_batch(self) -> list[tuple[int, Output]]:
        """Waits for an output, then takes all there are; empty when only a heartbeat is due. Raises a stream's failure."""
        if self._failure is not None:
            raise self._failure
        batch: list[tuple[int, Output]] = []
        item = await self._queue.get()
        while True:
            if isinstance(item, Exception):
                self._failure = item
                break
            if item is not None:
                batch.append(item)
            if self._queue.empty():
                break
            item = self._queue.get_nowait()
        if self._failure is not None and not batch:
            raise self._failure
        return batch

    def wrote(self) -> None:
        """Something has gone out to the client: silence begins anew. An output that shows nothing does not end it."""
        self.is_heartbeat_due = False
        self._written_s = asyncio.get_running_loop().time()

    async def aclose(self) -> None:
        """Stops reading and closes every stream, also when the caller is being cancelled; once is enough."""
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.shield(self._stop())

    async def _stop(self) -> None:
        pumps, self._pumps = self._pumps, []
        streams, self._streams = self._streams, []
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        await _close(streams)

    async def _pump(self, place: int, stream: OutputStream) -> None:
        try:
            async for output in stream:
                await self._queue.put((place, output))
                if output.finish_reason is not None:
                    return
            raise InvariantViolated(f"output stream {place} ended without a finish_reason")
        except Exception as error:
            await self._queue.put(error)

    def _watch_silence(self) -> None:
        """One timer per interval and job, not per output: it only looks when something was last written."""
        if self._heartbeat_s is None:
            return
        loop = asyncio.get_running_loop()
        left_s = self._written_s + self._heartbeat_s - loop.time()
        if left_s <= 0:
            self.is_heartbeat_due = True
            if self._queue.empty():
                self._queue.put_nowait(None)  # wakes next_batch
            left_s = self._heartbeat_s
        self._timer = loop.call_later(left_s, self._watch_silence)


async def _close(streams: list[OutputStream]) -> None:
    for ended in await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True):
        if isinstance(ended, Exception):
            _log.error("an output stream did not close", exc_info=ended)


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
