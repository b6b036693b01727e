"""What each attached router is to hear next: outputs at once, load and cache events with them or a few times a second. Knows no stream.

A router that is slow gets fewer, larger frames; what waits for it is bounded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from workers.engine.messages import DumpKv
from workers.request import Output
from workers.serving.events import CutStream, EndStream, Post, WriteFrame
from workers.status import Identity, KvEvent, Load, WorkerStatus
from workers.wire.attach import Found, WorkerFrame

STATUS_INTERVAL_S = 1.0
"""Every router hears so often that the worker lives."""
LOAD_INTERVAL_S = 0.25
"""A router that no output goes to hears so often of load and cache, as far as they change."""

SENDING_S = 5.0
"""A router that has sent a request within this time is taken to send more."""

MAX_FRAME_BYTES = 8 << 20
"""Of what outputs say in one frame, far below what a gRPC message may have. An output has at most 1 MiB, or one token a step."""

MAX_SCORE_BYTES = 256 << 20
"""Scores of prompts that may wait for one router."""

MAX_FOUND = 16
"""Of jobs that a router has asked for, in one frame: each has a ticket of at most 256 KiB."""
MAX_FOUND_WAITING = 1024
"""For one router; the answers to what it asks beyond that are not given."""

MAX_CACHE_EVENTS = 256
"""Kept for routers that have not heard of them; one that is further behind gets a dump."""


class CacheEvents:
    """The last events of the prefix cache, once for all routers, by the place that each has in the order of events."""

    def __init__(self) -> None:
        self._events: deque[KvEvent] = deque(maxlen=MAX_CACHE_EVENTS)
        self.num_told = 0
        """Events so far; the place of whoever has heard all of them."""

    def add(self, event: KvEvent) -> None:
        self._events.append(event)
        self.num_told += 1

    def since(self, place: int) -> list[KvEvent] | None:
        """What came after `place`; None when some of it is not kept any more."""
        num_new = self.num_told - place
        if num_new > len(self._events):
            return None
        return list(self._events)[len(self._events) - num_new :] if num_new else []


@dataclass(slots=True, eq=False)
class Session:
    """One attached router."""

    number: int
    router_id: str
    outputs: list[Output] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    ended_jobs: list[str] = field(default_factory=list)
    """That another router has ended."""
    is_status_due: bool = False
    said_load: Load | None = None
    """The load that the router heard last."""
    score_bytes: int = 0
    """Of scores of prompts that wait: one output may have most of a megabyte of them."""
    num_framed: int = 0
    """Outputs that went into frames."""
    wants_frame: bool = False
    is_load_due: bool = False
    is_closing: bool = False
    """It gets what waits for it, and no more."""
    is_cut: bool = False
    """It did not keep up; what waits for it is lost with its stream."""
    is_dump_asked: bool = False
    dump: KvEvent | None = None
    cache_place: int | None = None
    """None: it waits for a dump, which will contain what changes meanwhile."""
    num_kv_events: int = 0
    """Events are numbered for each router, since a dump is for one of them."""

    @property
    def has_news(self) -> bool:
        """Something that is worth a frame of its own."""
        return bool(self.outputs or self.found or self.ended_jobs) or self.is_status_due or self.is_load_due

    def is_behind(self, events: CacheEvents) -> bool:
        """The cache has changed since it heard of it."""
        return self.cache_place is not None and self.cache_place != events.num_told

    def take_frame(self, generation: int, load: Load, events: CacheEvents, status: WorkerStatus | None) -> WorkerFrame:
        """What waits, as much as goes into one frame, with `status` where that is due. A router that is too far behind for cache
        events waits for a dump from here on."""
        is_new = status is not None or load is not self.said_load
        changes = self._take_cache_events(events)
        count = frame_share(self.outputs)
        outputs, self.outputs = tuple(self.outputs[:count]), self.outputs[count:]
        if self.score_bytes:
            self.score_bytes -= sum(_about_bytes(output) for output in outputs if output.prompt_logprobs)
        found, self.found = tuple(self.found[:MAX_FOUND]), self.found[MAX_FOUND:]
        ended_jobs, self.ended_jobs = tuple(self.ended_jobs), []
        frame = WorkerFrame(generation, outputs, load if is_new else None, changes, status, found, ended_jobs)
        self.said_load = load
        self.num_framed += count
        self.wants_frame = self.is_load_due = self.is_status_due = False
        return frame

    def take_dump(self, dump: KvEvent, events: CacheEvents) -> None:
        """The whole cache as it was before the events that will be added next."""
        self.dump, self.cache_place = dump, events.num_told
        self.is_load_due, self.is_dump_asked = True, False

    def _take_cache_events(self, events: CacheEvents) -> tuple[KvEvent, ...]:
        if self.cache_place is None:
            return ()
        changes = events.since(self.cache_place)
        if changes is None:
            self.cache_place, self.dump = None, None
            return ()
        if self.dump is not None:
            changes.insert(0, self.dump)
        self.cache_place, self.dump = events.num_told, None
        first, self.num_kv_events = self.num_kv_events + 1, self.num_kv_events + len(changes)
        return tuple([replace(event, sequence=first + index) for index, event in enumerate(changes)])


class Sessions:
    """All attached routers. What is said here goes out with `flush`, to those whose streams can take it.

    `status()` is the worker as it is now; `max_outputs` may wait for one router before its stream is cut.
    """

    def __init__(
        self,
        identity: Identity,
        load: Load,
        status: Callable[[], WorkerStatus],
        max_outputs: int,
        counters: Counter[str],
    ) -> None:
        self.load = load
        self._identity = identity
        self._status = status
        self._max_outputs = max_outputs
        self._counters = counters
        self._sessions: dict[int, Session] = {}
        self._touched: dict[int, Session] = {}
        """Those that something has happened to since the last flush."""
        self._sending: dict[int, float] = {}
        """When each session that sends requests has last done so."""
        self._sending_since_s = inf
        """When the first of them began."""
        self.num_sending = 0
        """Routers that have lately sent requests. Where none has, and for a while after the first one has begun, all that are
        attached: they may begin at the same moment."""
        self._events = CacheEvents()
        self._is_closed = False
        self._has_unsaid_load = False
        self._status_due_s = self._loads_due_s = -inf

    def get(self, number: int) -> Session | None:
        return self._sessions.get(number)

    def of_router(self, router_id: str) -> int | None:
        """The session of a router."""
        return next((number for number, session in self._sessions.items() if session.router_id == router_id), None)

    def num_said(self, number: int | None) -> int:
        """Outputs that a session was told so far, those that wait for a frame included."""
        session = None if number is None else self._sessions.get(number)
        return 0 if session is None else session.num_framed + len(session.outputs)

    def num_framed(self, number: int) -> int:
        """Outputs of a session that went into the frames which it has been given."""
        session = self._sessions.get(number)
        return 0 if session is None else session.num_framed

    def attach(self, number: int, router_id: str) -> None:
        self._sessions[number] = Session(number, router_id, is_status_due=True, is_closing=self._is_closed)
        if self._sending_since_s == inf:
            self._count_sending(len(self._sessions))

    def sends(self, number: int, now: float) -> None:
        """A router has sent a request."""
        self._sending_since_s = min(self._sending_since_s, now)
        self._sending[number] = now
        self._count_sending(max(self.num_sending, len(self._sending)))

    def _count_sending(self, count: int) -> None:
        if count != self.num_sending:
            self.num_sending = count
            self.tell_status()

    def ask_for_dump(self, number: int) -> list[Post]:
        """What changes in the cache is not said until the dump comes, which contains it."""
        session = self._sessions.get(number)
        if session is None or session.is_dump_asked:  # the one that is on its way will do
            return []
        session.cache_place, session.dump, session.is_dump_asked = None, None, True
        return [Post(DumpKv(session.number))]

    def frame_wanted(self, number: int) -> None:
        """The stream can take a frame."""
        session = self._sessions.get(number)
        if session is not None:
            session.wants_frame = True
            self._touched[number] = session

    def say(self, number: int, output: Output) -> None:
        session = self._sessions.get(number)
        if session is not None:
            session.outputs.append(output)
            if output.prompt_logprobs:
                session.score_bytes += _about_bytes(output)
            self._touched[number] = session

    def tell_found(self, number: int, found: Found) -> None:
        """The answer to what a router has asked for."""
        session = self._sessions.get(number)
        if session is not None and len(session.found) < MAX_FOUND_WAITING:
            session.found.append(found)
            self._touched[number] = session

    def tell_ended(self, number: int, job: str) -> None:
        """The router of a session has ended a job, which may wait, or be kept, at the others."""
        for session in self._sessions.values():
            if session.number != number and len(session.ended_jobs) < MAX_FOUND_WAITING:
                session.ended_jobs.append(job)
                self._touched[session.number] = session

    def stepped(self, load: Load, event: KvEvent | None, dump: KvEvent | None, askers: list[int], now: float) -> None:
        """What a step of the engine means for all of them."""
        self.load, self._has_unsaid_load = load, True
        if dump is not None:
            for session in filter(None, map(self._sessions.get, askers)):
                session.take_dump(dump, self._events)
                self._touched[session.number] = session
        if event is not None:
            self._events.add(event)
        self._tell_loads(now)

    def tell_status(self) -> None:
        for session in self._sessions.values():
            session.is_status_due = True
        self._touched.update(self._sessions)

    def close(self, number: int) -> None:
        """Nothing more comes from the router: its stream ends with what waits for it."""
        session = self._sessions.get(number)
        if session is not None:
            session.is_closing = True
            self._touched[number] = session

    def close_all(self) -> None:
        """So for all, and for those that attach from now on."""
        self._is_closed = True
        for number in self._sessions:
            self.close(number)

    def lose(self, number: int) -> None:
        """The stream is gone."""
        self._sessions.pop(number, None)
        self._touched.pop(number, None)
        self._sending.pop(number, None)
        if self._sending:
            self._count_sending(min(self.num_sending, len(self._sessions)))
        else:  # those that are left, or come, may begin at the same moment
            self._sending_since_s = inf
            self._count_sending(len(self._sessions))

    @property
    def next_due_s(self) -> float:
        """When `check_time` has something to do."""
        return min(self._status_due_s, self._loads_due_s if self._has_unsaid_load else inf)

    def check_time(self, now: float) -> None:
        if now >= self._status_due_s:
            self._status_due_s = now + STATUS_INTERVAL_S
            self._forget_silent(now)
            self.tell_status()
        self._tell_loads(now)

    def _forget_silent(self, now: float) -> None:
        """Routers that have sent nothing for a while leave their share to the others."""
        self._sending = {number: at for number, at in self._sending.items() if now - at < SENDING_S}
        if not self._sending:
            self._sending_since_s = inf
        is_settled = now - self._sending_since_s >= STATUS_INTERVAL_S
        self._count_sending(len(self._sending if is_settled else self._sessions))

    def _tell_loads(self, now: float) -> None:
        if not self._has_unsaid_load or now < self._loads_due_s:
            return
        self._has_unsaid_load, self._loads_due_s = False, now + LOAD_INTERVAL_S
        for number, session in self._sessions.items():
            if session.said_load != self.load or session.is_behind(self._events):
                session.is_load_due = True
                self._touched[number] = session

    def flush(self) -> list[WriteFrame | EndStream | CutStream | Post]:
        """A frame for each stream that can take one and has news; the end of those that have said all."""
        commands: list[WriteFrame | EndStream | CutStream | Post] = []
        touched, self._touched = self._touched, {}
        for number, session in touched.items():
            if session.is_cut:
                continue
            if session.wants_frame and session.has_news:
                status = self._status() if session.is_status_due else None
                generation = self._identity.generation
                frame = session.take_frame(generation, self.load, self._events, status)
                commands.append(WriteFrame(number, frame))
                if session.cache_place is None and not session.is_dump_asked:
                    commands += self.ask_for_dump(number)
            elif session.wants_frame and session.is_closing:
                commands.append(EndStream(number))
            elif len(session.outputs) > self._max_outputs or session.score_bytes > MAX_SCORE_BYTES:
                session.is_cut = True
                self._counters["routers_cut"] += 1
                commands.append(CutStream(number, f"{session.router_id} does not keep up"))
        return commands


def frame_share(outputs: Sequence[Output]) -> int:
    """How many of these outputs go into one frame: at least one, if there is any."""
    num_bytes = 0
    for count, output in enumerate(outputs):
        num_bytes += _about_bytes(output)
        if num_bytes > MAX_FRAME_BYTES and count:
            return count
    return len(outputs)


def _about_bytes(output: Output) -> int:
    """What an output takes on the wire, roughly, and not less."""
    num_bytes = 256 + len(output.message) + 5 * len(output.token_ids) + 4 * len(output.text)
    if output.logprobs:
        num_bytes += sum(32 + 16 * len(entry.top) for entry in output.logprobs)
    return num_bytes + sum(part.num_bytes for part in output.prompt_logprobs)
