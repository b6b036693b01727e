"""One attached router: gathers what it must hear into frames; a slow one gets fewer, larger frames, and is cut off at a bound."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from workers.client import WorkerFrame
from workers.request import Output
from workers.status import KvEvent, Load, WorkerStatus

MAX_PENDING_KV_EVENTS = 256


class RouterSession:
    """Outputs, load and events that wait for the next frame. Used from the event loop only."""

    def __init__(self, router_id: str, max_pending_outputs: int) -> None:
        self.router_id = router_id
        self.sequences: dict[str, int] = {}
        """Sequence ids by request id, for cancels."""
        self._max = max_pending_outputs
        self._outputs: list[Output] = []
        self._kv_events: list[KvEvent] = []
        self._load: Load | None = None
        self._status: WorkerStatus | None = None
        self._wake = asyncio.Event()
        self.is_overrun = False
        """More outputs wait than the bound allows."""
        self._is_closed = False
        self._awaits_dump = True
        """The dump that has been asked for will contain what changes meanwhile."""
        self._num_kv_events = 0
        """Events are numbered for each router, since a dump is for one of them."""

    def add_output(self, output: Output) -> None:
        self._outputs.append(output)
        if len(self._outputs) > self._max:
            self.is_overrun = True
        self._wake.set()

    def add_load(self, load: Load) -> None:
        """Only the newest counts."""
        self._load = load
        self._wake.set()

    def add_dump(self, dump: KvEvent) -> None:
        """The full set of cached blocks; what went before it says nothing more."""
        self._awaits_dump = False
        self._kv_events = []
        self.add_kv_event(dump)

    def add_kv_event(self, event: KvEvent) -> bool:
        """True: so many events wait that they are dropped, and a dump is to be asked for, once."""
        if self._awaits_dump and not event.reset:
            return False
        if len(self._kv_events) >= MAX_PENDING_KV_EVENTS:
            self._kv_events = []
            self._awaits_dump = True
            return True
        self._num_kv_events += 1
        self._kv_events.append(replace(event, sequence=self._num_kv_events))
        return False

    def add_status(self, status: WorkerStatus) -> None:
        self._status = status
        self._wake.set()

    def close(self) -> None:
        """Lets the last frame go, and no more."""
        self._is_closed = True
        self._wake.set()

    @property
    def has_ended(self) -> bool:
        """Closed, and every output has been taken: what came while a frame was being written still goes."""
        return self._is_closed and not self._outputs

    async def next_frame(self, generation: int) -> WorkerFrame:
        """Waits until there is something to say, then takes all of it.

        A status that came meanwhile counts more than the generation in which the wait began: whoever hears of a switch
        must not ask for what it ended.
        """
        await self._wake.wait()
        self._wake.clear()
        if self._status is not None:
            generation = self._status.generation
        frame = WorkerFrame(generation, tuple(self._outputs), self._load, tuple(self._kv_events), self._status)
        self._outputs, self._kv_events, self._load, self._status = [], [], None, None
        return frame
