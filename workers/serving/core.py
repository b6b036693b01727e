"""Decides everything a worker decides beside its batches: `handle(event, now) -> commands`. Knows no sockets, no threads and no clock.

Which requests it takes and whose each is, roles, draining and suspension, what it hands over and what it fetches, what becomes of
each step's results, and when each router hears of what. Joins the parts: requests, sessions of routers, fetches and exports.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import assert_never

from workers.client import Cancel, DumpRequest, Hello, RouterMessage, Submit
from workers.config import WorkerConfig
from workers.errors import InvalidRequest, Refusal, Refused
from workers.identity import Identity
from workers.kv_transfer.memory import KvLayout
from workers.kv_transfer.recovery import Way
from workers.request import Output, error_output, refusal_output
from workers.scheduler.sequence import Kind
from workers.serving import events
from workers.serving.exports import Exports
from workers.serving.fetches import Fetches
from workers.serving.observer import Observer, Unobserved
from workers.serving.requests import RequestTable, ServedRequest
from workers.serving.sessions import Sessions
from workers.serving.standing import Standing
from workers.status import Load, WorkerStatus
from workers.stepping.commands import Add, AddMigrant, CancelSequence, ForgetCache
from workers.stepping.result import Report, TransferWanted

log = logging.getLogger(__name__)


class WorkerCore:
    """The worker's state machine. `now` is any clock in seconds that does not go back.

    `identity` is the core's: others read it. `describe(load, engine_counters)` puts the rest into a status.
    """

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        layout: KvLayout,
        fingerprint: str,
        describe: Callable[[Load, tuple[tuple[str, float], ...]], WorkerStatus],
        observer: Observer | None = None,
    ) -> None:
        self._standing = Standing(identity, layout, fingerprint)
        self.counters: Counter[str] = Counter({f"recovery_{way}": 0 for way in Way})
        """Totals of what became of handoffs; the loops around the core count in it as well."""
        self.num_held_blocks = 0
        self._describe = describe
        self._observer = observer or Unobserved()
        self._engine_counters: tuple[tuple[str, float], ...] = ()
        self._numbers = itertools.count(1)
        self._out: list[events.Command] = []
        self._requests = RequestTable()
        idle = Load(num_blocks=layout.num_blocks, num_free_blocks=layout.num_blocks)
        max_outputs = config.max_pending_frames * config.max_num_seqs
        self._sessions = Sessions(identity, idle, self.status, max_outputs, self.counters)
        self._fetches = Fetches(identity.worker_id, layout, config.transfer_timeout_s, self.counters, self._observer)
        self._exports = Exports(
            layout,
            config.max_pause_s,
            self._find,
            self._numbers.__next__,
            self.counters,
            self._observer,
        )

    def handle(self, event: events.Event, now: float) -> list[events.Command]:
        """Takes one event and returns what to do, in this order."""
        out = self._out
        match event:
            case events.StepReported(report):
                self._on_report(report, now)
            case events.FrameWanted(session):
                self._sessions.frame_wanted(session)
            case events.RouterSaid(session, message):
                self._on_message(session, message, now)
            case events.RouterAttached(session, router_id):
                self._sessions.attach(session, router_id)
                out += self._sessions.ask_for_dump(session)
            case events.RouterLeft(session):
                self._sessions.close(session)
            case events.RouterLost(session):
                self._sessions.lose(session)
                for served in self._requests.owned_by(session):
                    self._give_up(served)
            case events.LayersReported(layers):
                out += self._exports.layers_filled(layers)
            case events.HandoffAsked():
                self._on_asked(event)
            case events.HandoffBegun(transfer):
                out += self._exports.begin(transfer)
            case events.HandoffAcknowledged(transfer, num_pieces):
                out += self._exports.acknowledged(transfer, num_pieces)
            case events.HandoffReleased(transfer, reason):
                out += self._exports.release(transfer, reason)
            case events.HandoffEnded(sequence_id, outcome):
                out += self._fetches.ended(sequence_id, outcome, now)
            case events.SwitchRole(role):
                out += self._standing.switch(role)
                self._sessions.tell_status()
            case events.SetDrain(is_draining, remember):
                out += self._standing.drain(is_draining, remember)
                self._sessions.tell_status()
            case events.Suspend(reason):
                self._suspend(reason, now)
            case events.Resumed():
                self._standing.resume()
                self._sessions.tell_status()
            case events.Close():
                self._close(now)
            case events.Tick():
                self._sessions.check_time(now)
                out += self._exports.check_time(now)
            case _:
                assert_never(event)
        out += self._sessions.flush()
        self._out = []
        return out

    @property
    def next_due_s(self) -> float:
        """When the next Tick is due."""
        return min(self._sessions.next_due_s, self._exports.next_due_s)

    @property
    def is_idle(self) -> bool:
        """Holds no request, no block and no handoff; the loops around it may still be at the end of one."""
        return not (len(self._requests) or self.num_held_blocks or len(self._exports) or len(self._fetches))

    def status(self) -> WorkerStatus:
        """The worker as it is now."""
        return self._describe(self._sessions.load, self._engine_counters)

    # ---- requests ----

    def _on_message(self, session: int, message: RouterMessage, now: float) -> None:
        match message:
            case Submit():
                self._on_submit(session, message, now)
            case Cancel(request_id):
                served = self._requests.of(session, request_id)
                if served is not None:
                    self._give_up(served)
            case DumpRequest():
                self._out += self._sessions.ask_for_dump(session)
            case Hello(router_id):
                log.warning("%s said hello twice", router_id)
            case _:
                assert_never(message)

    def _on_submit(self, number: int, submit: Submit, now: float) -> None:
        """Queues a request; one that is not accepted is answered at once."""
        request, me = submit.request, self._standing.identity
        if self._sessions.get(number) is None:
            return
        try:
            self._standing.check_request(submit)
            if self._requests.of(number, request.request_id) is not None:
                raise InvalidRequest(f"request {request.request_id} is running already")
        except (InvalidRequest, Refused) as error:
            self._sessions.say(number, refusal_output(request, error))
            return
        sequence_id = next(self._numbers)
        candidates = tuple(c for c in submit.prefill_workers if c.worker_id != me.worker_id)
        due_s = min((now + left_s for left_s in (submit.remaining_s, submit.first_token_s) if left_s > 0), default=inf)
        self._requests.add(ServedRequest(sequence_id, request, candidates, submit.migration, due_s, number))
        self._observer.submitted(sequence_id, request.traceparent, now)
        if submit.migration is not None:
            self._out.append(events.Post(AddMigrant(sequence_id, request)))
        else:
            kind = Kind.TARGET if candidates else Kind.LOCAL
            self._out.append(events.Post(Add(sequence_id, request, kind, submit.prefix)))

    def _deliver(self, served: ServedRequest, output: Output, now: float) -> None:
        self._observer.said(served.sequence_id, output, now)
        self._sessions.say(served.owner, output)
        if output.finish_reason is not None:
            self._requests.remove(served)

    def _give_up(self, served: ServedRequest) -> None:
        """Nobody wants it any more."""
        self._requests.remove(served)
        self._observer.cancelled(served.sequence_id)
        self._out.append(events.Post(CancelSequence(served.sequence_id)))

    def _end_all(self, refusal: Refusal, message: str, now: float) -> None:
        """Ends every request, so that routers run it elsewhere."""
        for served in self._requests:
            self._deliver(served, error_output(served.request, refusal, message), now)
            self._out.append(events.Post(CancelSequence(served.sequence_id)))

    def _find(self, name: str) -> int | None:
        served = self._requests.named(name)
        return None if served is None else served.sequence_id

    # ---- what a step brought ----

    def _on_report(self, report: Report, now: float) -> None:
        self._engine_counters, self.num_held_blocks = report.counters, report.num_held_blocks
        self._fetches.measured.own_rate = report.prefill_rate
        result, out = report.result, self._out
        for sequence_id, output in result.outputs:
            served = self._requests.get(sequence_id)
            if served is not None:
                self._deliver(served, output, now)
            elif output.finish_reason is not None:
                out += self._exports.failed(sequence_id, output.message)
        for wanted in result.transfers:
            self._fetch(wanted, now)
        for move in result.exports:
            out += self._exports.moving(move, now)
        for pull in result.pulls:
            out += self._fetches.pull(pull, now)
        for sequence_id in result.abandoned:
            out += self._fetches.abandon(sequence_id)
        for held in result.held:
            out += self._exports.held(held)
        for filled in result.filled:
            out += self._exports.filled(filled)
        for prefilled in result.prefilled:
            out += self._exports.prefilled(prefilled)
        self._sessions.stepped(report.load, result.kv_event, result.kv_dump, result.dump_askers, now)

    def _fetch(self, wanted: TransferWanted, now: float) -> None:
        served = self._requests.get(wanted.sequence_id)
        if served is None:  # cancelled meanwhile
            self._out += self._fetches.decline(wanted.sequence_id)
        elif served.migration is not None:
            self._out += self._fetches.take_over(wanted, served.migration)
        else:
            # The prefill worker computes the prompt and its first token; a replay is the decode worker's business.
            request = replace(served.request, replay_token_ids=())
            self._out += self._fetches.fetch(wanted, request, served.candidates, served.due_s, now)

    def _on_asked(self, asked: events.HandoffAsked) -> None:
        try:
            self._standing.check_handoff(asked.opening, asked.generation)
            is_paced = self._exports.open(asked.transfer, asked.opening)
        except Refused as refused:
            self._out.append(events.RefuseHandoff(asked.transfer, refused.refusal, str(refused)))
        else:
            self._out.append(events.AcceptHandoff(asked.transfer, is_paced))

    # ---- its end, for a while or for good ----

    def _suspend(self, reason: str, now: float) -> None:
        """Gives everything up that runs here, so that routers run it elsewhere. What the cache holds may be gone with the rank."""
        changed = self._standing.suspend(reason)
        if not changed:
            return
        self._out += changed
        self._sessions.tell_status()
        self._end_all(Refusal.WORKER_LOST, "the worker that ran this request lost a rank", now)
        self._out += [events.FailHandoffs(reason), events.Post(ForgetCache())]

    def _close(self, now: float) -> None:
        """Refuses what comes, ends what runs so that routers run it elsewhere, and each stream with its last frame."""
        self._standing.close()
        self._end_all(Refusal.SHUTTING_DOWN, f"{self._standing.identity.worker_id} is stopping", now)
        self._out += self._fetches.abandon_all()
        self._out.append(events.FailHandoffs("the worker is stopping"))
        self._sessions.close_all()
