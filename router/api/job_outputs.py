"""Runs the requests of one job together, and hands on what comes of them, in the order in which it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from router.backend import Backend, OutputStream
from router.job_part import NO_JOB, JobPart
from router.policies.explain import Decision
from router.wishes import NO_WISHES, Wishes
from workers.request import FinishReason, Output, Request

T = TypeVar("T")

_SUBMITS_AT_ONCE = 8
"""Each takes the event loop for some 0.2 ms."""


class JobOutputs:
    """The output streams of one job. What is not read waits in the streams, which bound it. Used by one task."""

    def __init__(self, streams: list[OutputStream], heartbeat_s: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams = streams
        self._wakes = [partial(self._wake, place) for place in range(len(streams))]
        self._positions = [0] * len(streams)
        self._num_open = len(streams)
        self._ready = list(range(len(streams)))
        """Streams that may have something."""
        self._reader: asyncio.Future[None] | None = None
        self._show: Callable[[int, Output], bool] | None = None
        """Set while `next_batch` waits, where its caller gave one."""
        self._not_shown: list[tuple[int, Output]] = []
        self._failure: Exception | None = None
        """What `show`, or a stream, raised where an output came."""
        self._heartbeat_s = heartbeat_s
        self._written_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.is_heartbeat_due = False
        """Nothing was written for as long as a heartbeat's interval."""
        self.is_broken = False
        """A request was given up: it has ended, but has not run to its end."""
        self._watch_silence()

    @classmethod
    async def open(
        cls,
        backend: Backend,
        requests: tuple[Request, ...],
        heartbeat_s: float | None = None,
        wishes: Wishes = NO_WISHES,
        parts: Sequence[JobPart] = (),
    ) -> JobOutputs:
        """Submits every request, each as its part of the job; when one is refused, those before it are closed and the refusal is raised.

        Others have a turn between a few of them: a job may have thousands.
        """
        streams: list[OutputStream] = []
        try:
            for number, (request, part) in enumerate(zip(requests, parts or repeat(NO_JOB), strict=False), 1):
                streams.append(backend.submit(request, wishes, part))
                if number % _SUBMITS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(streams, heartbeat_s)

    def decisions(self) -> list[Decision | None]:
        """How each request was routed, as far as that was asked for."""
        return [stream.decision for stream in self._streams]

    async def next_batch(self, show: Callable[[int, Output], bool] | None = None) -> list[tuple[int, Output]]:
        """Waits for an output, then takes all there are; empty when only a heartbeat is due. Raises a stream's failure.

        With `show` an output that comes during the wait is given to it where it came, which costs no change of tasks. Once
        `show` returns False for one, that output and all that follow are returned from here; what it raises is raised here.
        """
        while True:
            batch, self._not_shown = self._not_shown, []
            if self._ready:
                ready, self._ready = self._ready, []
                for place in ready:
                    output = self._streams[place].take(self._wakes[place])
                    if output is not None:
                        self._note(place, output)
                        batch.append((place, output))
            if batch or self.is_heartbeat_due:
                return batch
            reader = self._reader = self._loop.create_future()
            self._show = show
            try:
                await reader
            finally:
                self._show = None
            if self._failure is not None:
                raise self._failure

    def wrote(self) -> None:
        """Something has gone out to the client: silence begins anew. An output that shows nothing does not end it."""
        self.is_heartbeat_due = False
        self._written_s = self._loop.time()

    def _note(self, place: int, output: Output) -> None:
        if output.finish_reason is FinishReason.ERROR:  # it says nothing of how far its request has come
            self.is_broken = True
        else:
            self._positions[place] = output.position + len(output.token_ids)
        if output.finish_reason is not None:
            self._num_open -= 1

    @property
    def has_ended(self) -> bool:
        """The end of every request has been taken."""
        return not self._num_open

    @property
    def num_tokens(self) -> int:
        """That were taken, of all requests."""
        return sum(self._positions)

    def close(self) -> None:
        """Closes every stream; once is enough."""
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams:
            stream.close()

    def _wake(self, place: int) -> None:
        show = self._show
        if show is None:
            self._ready.append(place)
            self._rouse()
            return
        try:
            output = self._streams[place].take(self._wakes[place])
            if output is None:
                return
            self._note(place, output)
            if show(place, output):
                return
            self._not_shown.append((place, output))
        except Exception as error:  # whose output came has nothing to do with it
            self._failure = error  # not the future's: that takes no StopIteration, and nobody would be roused
        self._rouse()

    def _rouse(self) -> None:
        self._show, reader = None, self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _watch_silence(self) -> None:
        """One timer per interval and job, not per output: it only looks when something was last written."""
        if self._heartbeat_s is None:
            return
        left_s = self._written_s + self._heartbeat_s - self._loop.time()
        if left_s <= 0:
            self.is_heartbeat_due = True
            self._rouse()
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
