"""Decides everything a router decides: `handle(event, now) -> commands`. Knows no sockets, no threads and no clock.

Joins the parts: the fleet (streams to workers), the prefix index (what they cache) and the flights (requests).
"""

from __future__ import annotations

from collections import Counter
from typing import assert_never

from router.config import RouterConfig
from router.events import (
    Command,
    Detach,
    Event,
    FrameArrived,
    JobEnded,
    JobSought,
    RequestArrived,
    RequestCancelled,
    SendMessage,
    ShutDown,
    Tick,
    WorkerDetached,
    WorkersChanged,
)
from router.fleet.fleet import FIRST_RECONNECT_S, Fleet, reconnect_delay_s
from router.fleet.prefix_index import PrefixIndex
from router.fleet.worker_entry import Backlog, WorkerEntry
from router.forecast.forecasts import Forecasts
from router.policies.policy import Policy
from router.requests.dispatch import Dispatcher
from router.requests.flights import InFlightRequests
from router.requests.move_planner import Mover
from router.requests.searches import Searches
from workers.status import WorkerAddress, starts_of
from workers.wire.attach import DumpRequest

IN_ORDER = frozenset(("moved", "left"))
"""Ends of streams that are no fault."""


class RouterCore:
    """The router's state machine. `now` is any clock in seconds that does not go back; `secret` is 32 random bytes, where workers
    are to believe nobody else."""

    def __init__(self, config: RouterConfig, policy: Policy, secret: bytes = b"") -> None:
        self.counters: Counter[str] = Counter()
        """Totals; each counts one kind of decision that an operator would want to know of."""
        self._out: list[Command] = []
        self._is_shut_down = False
        backlog = Backlog(config.worker_backlog, config.prefill_backlog_tokens)
        times = config.settle_s, config.worker_stale_s, config.tick_s, config.recovery_timeout_s
        self.forecasts = Forecasts()
        self.fleet = Fleet(*times, backlog, self.forecasts.steps)
        self.index = PrefixIndex(config.max_prefix_index_blocks)
        dispatcher = Dispatcher(policy, self.fleet, self.index, self.forecasts, config, secret)
        self.flights = InFlightRequests(config, self.fleet, dispatcher, self._out, self.counters)
        self.searches = Searches(self.fleet, config.find_timeout_s, self._out)
        phase = int.from_bytes(secret[:4]) / (1 << 32)
        self.mover = Mover(config, self.fleet, dispatcher, self.flights, phase)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes one event and returns what to do, in this order."""
        match event:
            case FrameArrived():
                self._on_frame(event, now)
            case RequestArrived(request, wishes, part):
                self.flights.arrive(request, wishes, part, now)
            case JobSought(number, job, ends):
                self.searches.begin(number, job, ends, self.flights.waiting(job), now)
                if ends:
                    self.flights.end_job(job, now)
            case RequestCancelled(request_id, reason):
                self.flights.cancel(request_id, reason, now)
            case Tick():
                self._on_tick(now)
            case WorkerDetached(worker_id, connection, reason):
                entry = self.fleet.on_connection(worker_id, connection)
                if entry is not None:
                    self._lose(entry, "detached", now, reconnect_delay_s(entry.num_failures), reason)
            case WorkersChanged(addresses):
                self._on_workers(addresses, now)
            case ShutDown():
                self._on_shut_down(now)
            case _:
                assert_never(event)
        self.flights.dispatch(now)
        commands = self._out.copy()
        self._out.clear()
        return commands

    # ---- what workers say ----

    def _on_frame(self, event: FrameArrived, now: float) -> None:
        frame = event.frame
        entry = self.fleet.on_connection(event.worker_id, event.connection)
        if entry is None:
            self.counters["stale_frames"] += 1
            return
        fault = entry.fault_of(frame)
        if fault is not None:
            self._lose(entry, fault, now, FIRST_RECONNECT_S)
            return
        was_up, before = entry.is_up, entry.generation
        self.fleet.apply_frame(entry, frame, now)
        if frame.status is not None and self.fleet.check_model(entry, self.flights.num_running == 0, now):
            self.counters["models_taken_over"] += 1
            self.flights.change_model(now)
        if not entry.is_up:
            self.counters["frames_before_status"] += 1
            return
        if not was_up:
            self.index.attach(entry.row)
            if before:
                again = starts_of(before) == starts_of(entry.generation)
                self.flights.journal.fault(
                    now, f"is there again{'' if again else ', as a new process'}", entry.worker_id, True
                )
            self.flights.find_again(entry, starts_of(before) == starts_of(entry.generation), now)
        if self.index.backlog:
            self.index.take_in()
        if frame.kv_events and any([self.index.apply(entry.row, kv_event) for kv_event in frame.kv_events]):
            self.counters["prefix_index_gaps"] += 1
            self._out.append(SendMessage(event.worker_id, event.connection, DumpRequest()))
        for output in frame.outputs:
            self.flights.take(output, event.worker_id, now)
        if self.flights.migrations.has_ended and not self._is_shut_down:
            self.flights.migrations.has_ended = False
            self.mover.leave(now)
        for found in frame.found:
            self.searches.take(event.worker_id, found)
        for job in frame.ended_jobs:
            self.flights.end_job(job, now)
            self._out.append(JobEnded(job))

    # ---- which workers there are ----

    def _on_workers(self, addresses: tuple[WorkerAddress, ...], now: float) -> None:
        for entry in self.fleet.set_members(addresses):
            self._lose(entry, "moved", now, 0.0)
        if not self._is_shut_down:
            self._out.extend(self.fleet.connect(now))

    def _lose(self, entry: WorkerEntry, reason: str, now: float, reconnect_s: float, message: str = "") -> None:
        """Gives up a stream and moves its requests elsewhere. `reason` names a counter."""
        if entry.is_up:
            self.counters[f"workers_lost_{reason}"] += 1
            if reason not in IN_ORDER:
                self.flights.journal.fault(now, f"lost: {message or reason}", entry.worker_id)
        if entry.connection is not None:
            self._out.append(Detach(entry.worker_id, entry.connection))
        running = self.flights.running_on(entry)
        self.fleet.close(entry, now + reconnect_s)
        self.index.drop(entry.row)
        self.searches.lose_worker(entry.worker_id)
        self.flights.lose_worker(entry.worker_id, running, f"lost worker {entry.worker_id}: {message or reason}", now)

    # ---- time ----

    def _on_tick(self, now: float) -> None:
        for entry in self.fleet.stale(now):
            self._lose(entry, "stale", now, FIRST_RECONNECT_S)
        for entry in self.fleet.left():
            self._lose(entry, "left", now, 0.0)
        if self.index.backlog:
            self.index.take_in()
        if not self._is_shut_down:
            self._out.extend(self.fleet.connect(now))
        self.fleet.table.has_opened = True
        self.forecasts.learn(self.fleet.table)
        self.flights.check_time(now)
        self.searches.check_time(now)
        if not self._is_shut_down:
            self.mover.run(now)

    def _on_shut_down(self, now: float) -> None:
        self._is_shut_down = True
        self.flights.close(now)
        for entry in self.fleet:
            if entry.connection is not None:
                self._out.append(Detach(entry.worker_id, entry.connection))
                self.fleet.close(entry, float("inf"))
