"""Decides what becomes of each request between its arrival and its end: wait, run, run again, or fail.

A request waits in the admission queue or runs as one attempt on one decode worker. An attempt has a name of its own on
the wire, so what an earlier attempt still says is recognised and ignored. Knows no streams.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

from router.config import RouterConfig
from router.events import Command, Deliver, Explain, Reject, SendMessage
from router.fleet.fleet import Fleet
from router.fleet.worker_entry import Backlog, WorkerEntry
from router.forecast.rate import Rate
from router.job_part import JobPart
from router.policies.policy import Route
from router.policies.promise import WaitingLine
from router.requests.arrivals import Arrivals
from router.requests.demand import DemandMeter, DemandReport
from router.requests.dispatch import Dispatcher
from router.requests.fair_queue import FairQueue
from router.requests.in_flight import TREATMENTS, InFlightRequest, MigrationAttempt, Mismatch, RetryPolicy, Treatment
from router.requests.journal import NUM_OLDEST, Journal, Way, by_age, is_called
from router.requests.leftovers import Leftovers
from router.requests.migrations import Migrations
from router.requests.sharers import Sharers
from router.requests.waiting_jobs import WaitingJobs
from router.wishes import Wishes
from workers.deadlines import Deadlines
from workers.errors import Refusal
from workers.request import FinishReason, Output, Request
from workers.wire.attach import Cancel


class InFlightRequests:
    """All requests that have not ended. Appends its commands to `out`, its surprises to `counters`."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, dispatcher: Dispatcher, out: list[Command], counters: Counter[str]
    ) -> None:
        self._config = config
        self._retry = RetryPolicy(
            config.max_attempts,
            config.max_lost_workers,
            config.retry_backoff_s,
            config.max_retry_backoff_s,
            config.recovery_timeout_s,
        )
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._out = out
        self._counters = counters
        self._flights: dict[str, InFlightRequest] = {}
        self._attempts: dict[str, InFlightRequest] = {}
        self._arrivals = Arrivals(config, fleet, dispatcher)
        self._queue = FairQueue(config.max_queue)
        self._sharers = Sharers()
        self._deadlines: Deadlines[str] = Deadlines()
        self._waiting_tokens = 0
        """Of the prompts in the queue."""
        self._waiting_jobs = WaitingJobs(fleet, out)
        self._finished = Rate()
        self._demand = DemandMeter()
        self.migrations = Migrations(config, fleet, dispatcher, out, counters, self._go_on)
        self._leftovers = Leftovers(fleet, self.migrations, out)
        self._num_arrived = 0
        self._unroutable_since_s: float | None = None
        self._blocked: InFlightRequest | None = None
        """It goes next, and nobody took it when it was last tried."""
        self.num_visited = 0
        """Requests that ticks have looked at."""
        self.num_tried = 0
        """How often a route was looked for."""
        self.journal = Journal()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._attempts)

    def demand(self, now: float) -> DemandReport:
        """What is asked of this router, as measured."""
        share = self._dispatcher.uncached_share
        return self._demand.report(len(self._queue), self._waiting_tokens * share, len(self._attempts), share, now)

    def ages(self, now: float) -> tuple[int, ...]:
        """Requests in flight by age; see journal.AGES_S."""
        return by_age((flight.arrived_s for flight in self._flights.values()), len(self._flights), now)

    def oldest(self) -> tuple[Way, ...]:
        """The oldest requests in flight, the oldest first."""
        return tuple(flight.way() for flight in islice(self._flights.values(), NUM_OLDEST))

    def ways_of(self, asked: str) -> tuple[Way, ...]:
        """The ways of the requests that an operator may mean: those in flight, and of those that have ended the last ones."""
        running = (flight.way() for name, flight in self._flights.items() if is_called(name, asked))
        ended = (way for way in self.journal.ended() if is_called(way.request_id, asked))
        return (*islice(running, NUM_OLDEST), *islice(ended, NUM_OLDEST))

    def running_on(self, entry: WorkerEntry) -> list[InFlightRequest]:
        """What decodes on a worker, without what is on its way there."""
        return [self._attempts[wire_id] for wire_id in entry.attempts if wire_id in self._attempts]

    # ---- arrival ----

    def arrive(self, request: Request, wishes: Wishes, part: JobPart, now: float) -> None:
        wishes = self._arrivals.with_defaults(wishes)
        flight = InFlightRequest(request, self._num_arrived + 1, arrived_s=now, queued_s=now, wishes=wishes, part=part)
        rejection = self._rejection_of(request, wishes.tenant) or self._arrivals.out_of_reach(
            flight, self._line(now), now
        )
        if rejection is not None:
            self._counters[f"rejected_{rejection.refusal}"] += 1
            self._out.append(rejection)
            return
        self._counters["requests"] += 1
        self._num_arrived += 1
        self._sharers.note(wishes.tenant, now)
        self._share(now)
        self._arrivals.hash(flight)
        self._flights[request.request_id] = flight
        self._deadlines.add(request.request_id, self._dispatcher.ends_s(flight))
        place = self._fleet.get(part.at) if part.at else None
        if place is not None and place.is_up and place.connection is not None:
            self._counters["requests_taken_up"] += 1
            flight.is_taken_up = True
            self._take_up(flight, place, now)
            return
        if wishes.round <= 1:
            self._demand.arrived(len(request.prompt_token_ids), now)
        self._enqueue(flight)

    def _share(self, now: float) -> None:
        """What waits at a worker is computed before whatever comes, so among tenants it is little."""
        most, num_requests = self._config.prefill_backlog_tokens, self._config.worker_backlog
        tokens = min(most, self._config.tenants.backlog_tokens) if self._sharers.are_several(now) else most
        self._fleet.set_backlog(Backlog(num_requests, tokens))

    def _take_up(self, flight: InFlightRequest, place: WorkerEntry, now: float) -> None:
        """It runs there already, or has ended there."""
        self._out.append(self._dispatcher.take_up(flight, place, now))
        self._attempts[flight.wire_id] = flight
        flight.note(now, "taken up", place.worker_id)

    def waiting(self, job: str) -> tuple[InFlightRequest, ...]:
        """What waits here for a worker of a job."""
        return tuple(self._flights[request_id] for request_id in self._waiting_jobs.of(job))

    def end_job(self, job: str, now: float) -> None:
        """What waits here of a job is not wanted any more."""
        for flight in self.waiting(job):
            self._fail(flight, Refusal.CANCELLED, "it was cancelled by who had asked for it", now)

    def _enqueue(self, flight: InFlightRequest, ready_s: float = 0.0) -> None:
        patient_until_s = flight.arrived_s + self._config.patience_s
        due_s = flight.arrived_s + flight.wishes.ttft_s if flight.wishes.ttft_s else patient_until_s
        late_s = due_s - self._dispatcher.lead_s(flight) if flight.wishes.ttft_s else due_s
        name, priority = flight.request.request_id, flight.request.priority
        # What runs again has been counted; the fault is not its tenant's.
        num_tokens = 0.0 if flight.num_attempts else self._dispatcher.predicted_tokens(flight)
        wishes = flight.wishes
        self._queue.push(
            name,
            priority,
            flight.order,
            ready_s,
            due_s,
            patient_until_s,
            late_s,
            tenant=wishes.tenant,
            weight=wishes.weight,
            num_tokens=num_tokens,
        )
        self._waiting_tokens += len(flight.request.prompt_token_ids)
        self._waiting_jobs.add(flight, flight.queued_s)

    def _dequeue(self, flight: InFlightRequest) -> None:
        if flight.request.request_id in self._queue:
            self._queue.remove(flight.request.request_id)
            self._left_queue(flight)

    def _left_queue(self, flight: InFlightRequest) -> None:
        self._waiting_tokens -= len(flight.request.prompt_token_ids)
        self._waiting_jobs.remove(flight)

    def _line(self, now: float) -> WaitingLine:
        """What a request that comes now has before it."""
        tokens = self._waiting_tokens * self._dispatcher.uncached_share
        return WaitingLine(len(self._queue), tokens, self._finished.per_s(now))

    def change_model(self, now: float) -> None:
        """Another model is served from now on; nothing runs. What waits for its first token waits on, if the model can take it."""
        for flight in [self._flights[request_id] for request_id in self._queue.ids()]:
            rejection = self._arrivals.unfit(flight.request)
            if flight.is_started or flight.has_scores:
                self._fail(flight, Refusal.NO_WORKERS, "the model that this answer began with is served no more", now)
            elif rejection is not None:
                self._fail(flight, rejection.refusal, rejection.message, now)

    def _rejection_of(self, request: Request, tenant: str) -> Reject | None:
        name = request.request_id
        if self._is_closed:
            return Reject(name, Refusal.SHUTTING_DOWN, "this router is shutting down")
        if name in self._flights:
            return Reject(name, Refusal.INVALID, f"request id {name!r} is in use", "request_id")
        unfit = self._arrivals.unfit(request)
        if unfit is not None:
            return unfit
        if self._queue.is_full(tenant):
            return Reject(name, Refusal.QUEUE_FULL, "too many requests are waiting", retry_after_s=1.0)
        return None

    def dispatch(self, now: float) -> None:
        """Sends waiting requests to workers, while there is room and a worker takes them.

        Runs after every event, so it looks for a route only when the request that goes next is another one than before, or
        when a worker has come that may take it.
        """
        table = self._fleet.table
        while self._queue and len(self._attempts) < self._config.max_running:
            request_id = self._queue.first(now)
            if request_id is None:
                return
            flight = self._flights[request_id]
            if flight is self._blocked and not table.has_opened:
                return
            table.has_opened = False
            self.num_tried += 1
            self._arrivals.hash(flight)
            route = self._dispatcher.route(flight, now) if table.num_decoding else None
            if route is None:
                self._blocked = flight
                if not table.num_decoding and self._unroutable_since_s is None:
                    self._unroutable_since_s = now
                return
            self._blocked = None
            self._unroutable_since_s = None
            if self._is_hopeless(flight, route, now):
                continue
            self._queue.take(request_id)
            self._left_queue(flight)
            if flight.wishes.explain:
                self._out.append(Explain(request_id, self._dispatcher.explain(flight, route, now)))
            self._out.append(self._dispatcher.submit(flight, route, now))
            self._attempts[flight.wire_id] = flight
            computes = (
                "" if flight.prefill_worker_id == flight.worker_id else f"prefill on {flight.prefill_worker_id}, "
            )
            flight.note(now, "sent", flight.worker_id, f"{computes}{route.reason}")
            if flight.left is not None and flight.left[0] != flight.worker_id:
                self._leftovers.end(*flight.left)
            flight.left = None
            self._counters["replayed_tokens"] += len(flight.delivered)
            self._counters[f"routed_by_{route.reason}"] += 1
            self._counters["routed_remote_prefill" if route.prefill else "routed_local_prefill"] += 1

    def _is_hopeless(self, flight: InFlightRequest, route: Route, now: float) -> bool:
        """It was promised a first token in time, and none can come in time any more: no work is spent on it."""
        ttft_s = flight.wishes.ttft_s
        if self._config.admission != "strict" or not ttft_s or not route.ttft_s or flight.num_attempts:
            return False
        if now + route.ttft_s * self._dispatcher.ttft_scale <= flight.arrived_s + ttft_s:
            return False
        self._fail(flight, Refusal.TARGET_MISSED, f"its first token could not come within ttft = {ttft_s:g} s", now)
        return True

    # ---- outputs ----

    def take(self, output: Output, worker_id: str, now: float) -> None:
        """An output came from a worker's current stream."""
        flight = self._attempts.get(output.request_id)
        if flight is None or flight.worker_id != worker_id:
            self._counters["stale_outputs"] += not self.migrations.take(output, worker_id, now)
            return
        match output.finish_reason:
            case None:
                pass
            case FinishReason.MOVED:
                self._leave(flight, output.message, now)
                return
            case FinishReason.ERROR:
                self._set_back(flight, output.refusal or Refusal.INTERNAL, output.message, now)
                return
        accepted = flight.accept(output)
        if isinstance(accepted, Output):
            self._deliver(flight, accepted, now)
            if flight.incoming is not None:
                self.migrations.check(flight, now)
            return
        match accepted:
            case Mismatch.REPEAT:
                self._counters["repeated_outputs"] += 1
            case Mismatch.CONFLICT:
                self._counters["conflicting_outputs"] += 1
                self._cancel_attempt(flight)
                self._fail(flight, Refusal.INTERNAL, "a re-run brought other tokens than those already sent", now)
            case Mismatch.GAP | Mismatch.UNCUTTABLE | Mismatch.IMPOSSIBLE:
                self._counters[f"{accepted.value}_outputs"] += 1
                self._cancel_attempt(flight)
                self._set_back(flight, Refusal.WORKER_LOST, f"{worker_id} lost its place in the output", now)

    def _leave(self, flight: InFlightRequest, target_id: str, now: float) -> None:
        """The worker has handed the sequence over and says no more of it. `target_id`: whom another router has had it moved to."""
        target = self._fleet.get(target_id)
        if flight.incoming is not None:
            self.migrations.switch(flight, now)
        elif target is not None and target.is_up and target.connection is not None:
            self._counters["moves_followed"] += 1
            self._end_attempt(flight)
            self._take_up(flight, target, now)
        else:
            self._set_back(flight, Refusal.WORKER_LOST, "the worker that it had moved to was lost", now)

    def _go_on(self, flight: InFlightRequest, incoming: MigrationAttempt, now: float) -> None:
        """The second attempt is the running one; its outputs so far follow."""
        self._end_attempt(flight)
        flight.note(now, "moved", incoming.worker_id, f"after {len(flight.delivered)} tokens")
        flight.go_on(incoming)
        self._attempts[flight.wire_id] = flight
        self._dispatcher.note_running(flight)
        for output in incoming.buffered:
            self.take(output, incoming.worker_id, now)

    def _deliver(self, flight: InFlightRequest, output: Output, now: float) -> None:
        # What is taken up was asked of another router, and much of it comes at once; a round of a search is no answer.
        is_answer_here = not flight.is_taken_up and not flight.wishes.round
        if output.token_ids:
            if is_answer_here:
                self._demand.generated(len(output.token_ids), flight.spoke_s or now, now)
            if flight.history.num_setbacks:
                flight.history.progress()
        if not flight.has_spoken and (output.token_ids or output.finish_reason is not None):
            flight.has_spoken = True
            flight.note(now, "first output", flight.worker_id)
            if flight.spoke_s is None:
                flight.spoke_s = now
                if is_answer_here:
                    self._demand.first_token(now - flight.arrived_s, now)
            self._dispatcher.note_answer(flight, output, now)
            self._dispatcher.release(flight)
        self._out.append(Deliver(output))
        if output.finish_reason is not None:
            self._counters[f"finished_{output.finish_reason}"] += 1
            self._finished.note(now)
            if is_answer_here:
                self._demand.ended(len(flight.delivered), now - (flight.spoke_s or now), now)
            self._forget(flight, now, str(output.finish_reason))

    # ---- trouble ----

    def lose_worker(self, worker_id: str, running: list[InFlightRequest], message: str, now: float) -> None:
        """A worker's stream is gone, and with it what was `running` there."""
        left = {flight.wire_id: flight.request.request_id for flight in running} | self.migrations.lose_worker(
            worker_id, now
        )
        self._leftovers.add(worker_id, left)
        self._waiting_jobs.lose_worker(worker_id)
        if running:
            self.journal.fault(
                now, f"{len(running)} requests that ran there are run again", worker_id, is_recovery=True
            )
        for flight in running:
            has_moved = flight.incoming is not None and bool(flight.incoming.buffered)
            if not has_moved and flight.history.worker_lost(self._retry):
                self._fail(flight, Refusal.WORKERS_DIED, message, now)
            else:
                self._set_back(flight, Refusal.WORKER_LOST, message, now)

    def find_again(self, entry: WorkerEntry, is_same_process: bool, now: float) -> None:
        """A worker's stream is up again."""
        self._leftovers.find_again(entry, is_same_process, self._flights, now)

    def cancel(self, request_id: str, reason: str, now: float) -> None:
        """Nobody wants this request any more; no output follows. `reason` names a counter."""
        flight = self._flights.get(request_id)
        if flight is not None:
            self._counters[f"cancelled_{reason}"] += 1
            kept = flight.part.kept
            is_background = kept is not None and kept.is_background
            self._cancel_attempt(flight, flight.part.lets_go and (is_background or reason != "client_gone"))
            self._forget(flight, now, f"cancelled: {reason}")

    def check_time(self, now: float) -> None:
        """Fails requests that live too long, and those for which no worker has come back in time."""
        self._share(now)
        self.migrations.check_time(now)
        self._leftovers.forget()
        self._waiting_jobs.check_time(now)
        for request_id in self._deadlines.past(now):
            self.num_visited += 1
            flight = self._flights[request_id]
            self._cancel_attempt(flight)
            self._fail(flight, Refusal.DEADLINE_EXCEEDED, _too_long(flight), now)
        if self._fleet.can_decode:
            self._unroutable_since_s = None
            return
        since_s = self._unroutable_since_s = now if self._unroutable_since_s is None else self._unroutable_since_s
        if now - since_s < self._config.recovery_timeout_s:
            return
        for flight in [self._flights[request_id] for request_id in self._queue.ids()]:
            if now - max(flight.queued_s, since_s) >= self._config.recovery_timeout_s:
                self._fail(flight, Refusal.NO_WORKERS, "no worker came back in time", now)

    def close(self, now: float) -> None:
        """Fails everything and accepts nothing more."""
        self._is_closed = True
        for flight in list(self._flights.values()):
            self._cancel_attempt(flight, flight.part.lets_go)
            self._fail(flight, Refusal.SHUTTING_DOWN, "the router is shutting down", now)

    def _set_back(self, flight: InFlightRequest, refusal: Refusal, message: str, now: float) -> None:
        """An attempt has failed: runs the request again, or gives it up."""
        if flight.incoming is not None and flight.incoming.buffered:
            self.migrations.switch(flight, now)  # it had moved just in time
            return
        self.migrations.drop(flight, now)
        self._end_attempt(flight)
        delay_s = flight.history.setback(refusal, self._retry, now)
        if delay_s is None:
            if TREATMENTS[refusal] is Treatment.BUSY:  # it was accepted: that is no word for a client any more
                refusal, message = Refusal.NO_WORKERS, "no worker could take the request in time; send it again later"
            elif refusal is Refusal.DEADLINE_EXCEEDED:  # a worker has seen it first
                message = _too_long(flight)
            self._fail(flight, refusal, message, now)
            return
        self._counters[f"reruns_{refusal}"] += 1
        flight.note(now, "runs again", flight.worker_id, f"{refusal}: {message}")
        flight.avoid_worker_id = flight.worker_id
        flight.queued_s = now
        self._enqueue(flight, now + delay_s)

    def _fail(self, flight: InFlightRequest, refusal: Refusal, message: str, now: float) -> None:
        """Ends a request for good with an error."""
        self._counters[f"failed_{refusal}"] += 1
        name, position = flight.request.request_id, len(flight.delivered)
        error = Output(name, position, finish_reason=FinishReason.ERROR, refusal=refusal, message=message)
        self._out.append(Deliver(error))
        self._forget(flight, now, f"{refusal}: {message}")

    def _cancel_attempt(self, flight: InFlightRequest, lets_go: bool = False) -> None:
        entry = self._fleet.get(flight.worker_id)
        if flight.wire_id and entry is not None and entry.connection is not None:
            self._out.append(SendMessage(entry.worker_id, entry.connection, Cancel(flight.wire_id, lets_go)))
        self._end_attempt(flight)

    def _end_attempt(self, flight: InFlightRequest) -> None:
        if flight.wire_id:
            del self._attempts[flight.wire_id]
            self._dispatcher.release(flight)
            self._dispatcher.end(flight.worker_id, flight.wire_id)
            flight.wire_id = ""

    def _forget(self, flight: InFlightRequest, now: float, how: str) -> None:
        """`how` it has ended, for operators."""
        flight.note(now, "ended", flight.worker_id, how)
        self.journal.end(flight.way(how))
        self.migrations.drop(flight, now)
        self._end_attempt(flight)
        if flight.left is not None:
            self._leftovers.end(*flight.left)
        self._dequeue(flight)
        self._deadlines.remove(flight.request.request_id)
        del self._flights[flight.request.request_id]


def _too_long(flight: InFlightRequest) -> str:
    timeout_s = flight.wishes.timeout_s
    if timeout_s:
        return f"the request was not done within timeout = {timeout_s:g} s"
    return "the request took longer than the router allows"
