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
from typing import assert_never

from workers.config import WorkerConfig
from workers.engine.messages import ForgetCache, Report, TransferWanted
from workers.errors import Refusal, Refused
from workers.handoff.protocol.choices import Recovery
from workers.handoff.protocol.messages import Handoff, SequenceMoved
from workers.kv_memory.memory import KvLayout
from workers.serving import events
from workers.serving.exports import Exports
from workers.serving.fetches import Fetches
from workers.serving.observer import Observer, Unobserved
from workers.serving.requests import QUEUE_IS_FULL, Requests
from workers.serving.sessions import Sessions
from workers.serving.standing import Standing
from workers.status import Identity, Load, WorkerStatus
from workers.wire.attach import Adopt, Cancel, DumpRequest, Find, RouterHello, RouterMessage, Submit, Waits

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
        self.counters: Counter[str] = Counter({f"recovery_{recovery}": 0 for recovery in Recovery})
        """Totals of what became of handoffs; the loops around the core count in it as well."""
        self.num_held_blocks = 0
        self._describe = describe
        self._observer = observer or Unobserved()
        self._engine_counters: tuple[tuple[str, float], ...] = ()
        self._out: list[events.Command] = []
        idle = Load(num_blocks=layout.num_blocks, num_free_blocks=layout.num_blocks)
        max_outputs = config.max_pending_frames * config.max_num_seqs
        self._sessions = Sessions(identity, idle, self.status, max_outputs, self.counters)
        new_number = itertools.count(1).__next__
        self._requests = Requests(config, self._standing, self._sessions, new_number, self.counters, self._observer)
        self._fetches = Fetches(identity.worker_id, layout, config.transfer_timeout_s, self.counters, self._observer)
        self._exports = Exports(
            layout,
            config.max_pause_s,
            self._requests.find,
            new_number,
            self.counters,
            self._observer,
        )

    def handle(self, event: events.Event, now: float) -> list[events.Command]:
        """Takes one event and returns what to do, in this order."""
        out = self._out
        self._requests.tell_time(now)
        match event:
            case events.StepReported(report):
                self._on_report(report, now)
            case events.FrameWanted(session):
                self._requests.written(session)
                self._sessions.frame_wanted(session)
            case events.RouterSaid(session, message):
                self._on_message(session, message, now)
            case events.RouterAttached(session, router_id):
                self._on_attached(session, router_id, now)
            case events.RouterLeft(session):
                self._sessions.close(session)
            case events.RouterLost(session):
                self._sessions.lose(session)
                out += self._requests.lose_router(session, now)
            case events.NotAdded(sequence_id):
                out += self._requests.not_added(sequence_id, now)
                out += self._exports.failed(sequence_id, QUEUE_IS_FULL)
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
                if isinstance(outcome, Handoff) and isinstance(outcome.done, SequenceMoved):
                    self._requests.landed(sequence_id, outcome.done.known_token_ids)
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
                out += self._requests.check_time(now)
            case _:
                assert_never(event)
        out += self._sessions.flush()
        self._out = []
        return out

    @property
    def next_due_s(self) -> float:
        """When the next Tick is due."""
        return min(self._sessions.next_due_s, self._exports.next_due_s, self._requests.next_due_s)

    @property
    def is_idle(self) -> bool:
        """Holds no request, no block and no handoff; the loops around it may still be at the end of one."""
        return not (len(self._requests) or self.num_held_blocks or len(self._exports) or len(self._fetches))

    @property
    def load(self) -> Load:
        """As the engine said it last."""
        return self._sessions.load

    def status(self) -> WorkerStatus:
        """The worker as it is now."""
        status = self._describe(self._sessions.load, self._engine_counters)
        return replace(status, num_routers=self._sessions.num_sending)

    def _on_attached(self, session: int, router_id: str, now: float) -> None:
        """A router has one stream. An earlier one of the same router is dead, though nothing may have said so yet: its requests
        are this router's to take up, and what it still carries is heard no more."""
        earlier = self._sessions.of_router(router_id)
        if earlier is not None:
            self.counters["routers_attached_anew"] += 1
            self._out.append(events.CutStream(earlier, f"{router_id} has attached anew"))
            self._sessions.lose(earlier)
            self._out += self._requests.lose_router(earlier, now)
        self._sessions.attach(session, router_id)
        self._out += self._sessions.ask_for_dump(session)

    def _on_message(self, session: int, message: RouterMessage, now: float) -> None:
        if self._sessions.get(session) is None:  # its stream has been cut, or its router has attached anew
            return
        match message:
            case Submit():
                self._sessions.sends(session, now)
                self._out += self._requests.submit(session, message, now)
            case Cancel():
                self._out += self._requests.cancel(session, message, now)
            case Find():
                self._out += self._requests.look_up(session, message)
            case Waits():
                self._requests.waiting.say(session, message)
            case Adopt():
                self._requests.adopt(session, message)
            case DumpRequest():
                self._out += self._sessions.ask_for_dump(session)
            case RouterHello(router_id):
                log.warning("%s said hello twice", router_id)
            case _:
                assert_never(message)

    # ---- what a step brought ----

    def _on_report(self, report: Report, now: float) -> None:
        self._engine_counters, self.num_held_blocks = report.counters, report.num_held_blocks
        self._fetches.measured.own_rate = report.prefill_rate
        result, out = report.result, self._out
        for sequence_id, output in result.outputs:
            served = self._requests.get(sequence_id)
            if served is not None:
                out += self._requests.deliver(served, output, now)
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
        self._out += self._requests.end_all(Refusal.WORKER_LOST, "the worker that ran this request lost a rank", now)
        self._out += [events.FailHandoffs(reason), events.Post(ForgetCache())]

    def _close(self, now: float) -> None:
        """Refuses what comes, ends what runs so that routers run it elsewhere, and each stream with its last frame."""
        self._standing.close()
        self._out += self._requests.end_all(
            Refusal.SHUTTING_DOWN, f"{self._standing.identity.worker_id} is stopping", now
        )
        self._out += self._fetches.abandon_all()
        self._out.append(events.FailHandoffs("the worker is stopping"))
        self._sessions.close_all()
