"""The receiving end of simulated handoffs: what workers.handoff.target_driver does with streams and transports, here with the simulated network, around the same session."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.sim.network import Pipe
from cluster.sim.product import (
    Cut,
    Done,
    Due,
    Handoff,
    HandoffDown,
    HandoffFailed,
    KvPiece,
    KvPieces,
    OpenHandoff,
    Refusal,
    TargetSession,
    source_end,
    target_end,
    worker_events,
)
from cluster.sim.timeline import Timer

if TYPE_CHECKING:
    from cluster.sim.handoff_source import Sending
    from cluster.sim.worker import SimWorker

TRANSPORTS = ("nixl", "tcp")
"""The ways that simulated KV can travel; they cost the same."""


class Deadline:
    """Calls `fire` when the next deadline of a session is due, which an event of it may move to a later time, and no event to an earlier one."""

    def __init__(
        self, worker: SimWorker, next_deadline_s: Callable[[], float | None], fire: Callable[[], None]
    ) -> None:
        self._worker, self._timeline = worker, worker.world.timeline
        self._next_deadline_s, self._fire = next_deadline_s, fire
        self._timer: Timer | None = None

    def look(self) -> None:
        """Something has happened to the session."""
        if self._timer is not None:
            return  # it looks again by itself
        due_s = self._next_deadline_s()
        if due_s is not None:
            self._timer = self._timeline.at(due_s, self._due)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        if self._worker.defer(self._due):
            return
        self._timer = None
        due_s = self._next_deadline_s()
        if due_s is not None and due_s <= self._timeline.now:
            self._fire()
        else:
            self.look()


class Receiving:
    """A Receive that runs: the loop around one TargetSession."""

    def __init__(self, worker: SimWorker, command: worker_events.Receive) -> None:
        self._worker = worker
        self._command = command
        self._timeline = worker.world.timeline
        layout = worker.layout
        cut = Cut(layout, command.first_block, len(command.blocks) - command.first_block)
        opening = OpenHandoff(
            target=worker.identity.address,
            host=worker.name,
            source_generation=command.source.generation,
            model_fingerprint=worker.model.fingerprint,
            layout=layout,
            subject=command.subject,
            first_block=command.first_block,
            num_blocks=cut.num_blocks,
            transports=TRANSPORTS,
            takes_batches=True,
        )
        self._session = TargetSession(cut, opening, worker.config.transfer_timeout_s, plan=command.plan)
        self._opening = opening
        self.name = worker.name
        self._source = worker.world.worker_at(command.source.target)
        self._sending: Sending | None = None
        self._down = Pipe(worker.world.network, worker.name, command.source.worker_id, self._damaged_below)
        self._arrived: set[int] = set()
        self._lost: set[int] = set()
        """Of this epoch."""
        self._collects: list[tuple[KvPiece, ...]] = []
        self._epoch = -1
        self._deadline = Deadline(worker, self._session.next_deadline_s, lambda: self.feed(Due()))
        self._is_over = False
        self._is_stopped = False
        self._patience: Timer | None = None
        self._has_lost_patience = False
        self._opened_s = self._first_s = self._done_s = 0.0
        self._busy_since_s = self._busy_s = 0.0

    def start(self) -> None:
        self._opened_s = self._timeline.now
        if self._command.patience_s is not None:
            self._patience = self._timeline.after(self._command.patience_s, self._lose_patience)
        if self._source is None or self._source.is_dead:
            self._timeline.after(
                self._worker.latency_s, self.feed, target_end.HandoffLost("the sender cannot be reached")
            )
        self._carry_out(self._session.open(self._timeline.now))

    def stop(self) -> None:
        """As StopReceiving."""
        self._is_stopped = True
        self.feed(target_end.HandoffLost("the request was cancelled", Refusal.SHUTTING_DOWN, is_ours=True))

    def _lose_patience(self) -> None:
        self._has_lost_patience = True
        self.feed(target_end.HandoffLost("it took too long", Refusal.SHUTTING_DOWN, is_ours=True))

    def feed(self, event: target_end.TargetEvent) -> None:
        """An event of the session, at the receiver's own time."""
        if self._worker.defer(self.feed, event) or self._is_over:
            return
        if isinstance(event, KvPieces) and event.pieces and not self._first_s:
            self._first_s = self._timeline.now
        elif isinstance(event, Done):
            self._done_s = self._timeline.now
        self._carry_out(self._session.handle(event, self._timeline.now))

    def _carry_out(self, commands: list[target_end.TargetCommand]) -> None:
        pending = deque(commands)
        while pending:
            match pending.popleft():
                case target_end.SendDown(message):
                    self._say(message)
                case target_end.Connect(_, epoch, _):
                    self._close_inbox()
                    self._timeline.after(2 * self._worker.latency_s, self._connected, epoch)
                case target_end.Collect(pieces):
                    if not self._collects:
                        self._busy_since_s = self._timeline.now
                    self._collects.append(pieces)
                    numbers = [piece.piece for piece in pieces]
                    if not (self._arrived.isdisjoint(numbers) and self._lost.isdisjoint(numbers)):
                        self._timeline.soon(self._look)
                case target_end.CloseInbox():
                    self._close_inbox()
                    self._timeline.soon(self.feed, target_end.Closed())
                case target_end.Land(done):
                    self._end(self._handoff(done))
                case target_end.Fail(reason, refusal):
                    session = self._session
                    self._end(HandoffFailed(reason, refusal, session.num_resent, session.num_degradations))
        if not self._is_over:
            self._deadline.look()

    # ---- the control stream ----

    def _say(self, message: HandoffDown) -> None:
        source = self._source
        if source is None:
            return
        if isinstance(message, OpenHandoff):
            self._down.send(self._worker.latency_s, source.asked, self, message)
        else:
            self._down.send(self._worker.latency_s, self._heard_below, message)

    def _heard_below(self, message: HandoffDown) -> None:
        if self._sending is not None:
            self._sending.feed(message)

    def _damaged_below(self, reason: str) -> None:
        if self._sending is not None:
            self._sending.feed(source_end.HandoffBroken(reason, is_ours=True))

    def answered(self, sending: Sending) -> None:
        """The sender serves it."""
        self._sending = sending

    def damaged_above(self, reason: str) -> None:
        self.feed(target_end.HandoffLost(reason, is_ours=True))

    # ---- the data path ----

    def _connected(self, epoch: int) -> None:
        self._epoch = epoch
        self._arrived, self._lost = set(), set()
        self.feed(target_end.Connected(epoch))

    def arrived(self, epoch: int, pieces: tuple[int, ...], contents: list[list[int]]) -> None:
        """Bytes are in their places: what is in each layer of each piece."""
        if epoch == self._epoch:
            self._write(pieces, contents)
            self._arrived.update(pieces)
            self._look()

    def _write(self, pieces: tuple[int, ...], contents: list[list[int]]) -> None:
        layers, blocks, slot_of = self._worker.memory.content.layers, self._command.blocks, self._session.cut.slot
        for number, content in zip(pieces, contents, strict=True):
            slot = slot_of(number)
            for layer, value in enumerate(content, slot.first_layer):
                layers[layer][blocks[slot.block]] = value

    def lost(self, epoch: int, pieces: tuple[int, ...]) -> None:
        """Bytes will not come."""
        if epoch == self._epoch:
            self._lost.update(pieces)
            self._look()

    def _look(self) -> None:
        if self._worker.defer(self._look):
            return
        waiting: list[tuple[KvPiece, ...]] = []
        told: list[target_end.Collected] = []
        for pieces in self._collects:
            numbers = [piece.piece for piece in pieces]
            if self._arrived.issuperset(numbers):
                told.append(target_end.Collected(tuple(numbers)))
            elif all([number in self._arrived or number in self._lost for number in numbers]):
                good = tuple([number for number in numbers if number in self._arrived])
                bad = tuple([number for number in numbers if number not in self._arrived])
                told.append(target_end.Collected(good, bad, f"{len(bad)} pieces were lost" if bad else ""))
            else:
                waiting.append(pieces)
        if told and not waiting:
            self._busy_s += self._timeline.now - self._busy_since_s
        self._collects = waiting
        for collected in told:
            self.feed(collected)

    def _close_inbox(self) -> None:
        """What has not arrived will not be written any more."""
        self._epoch = -1
        self._lost.update(
            piece.piece for pieces in self._collects for piece in pieces if piece.piece not in self._arrived
        )
        self._look()

    # ---- time and end ----

    def abandon(self) -> None:
        """The receiver's process is gone."""
        self._is_over = True
        self._down.is_closed = True
        self._deadline.stop()
        if self._patience is not None:
            self._patience.cancel()
        if self._sending is not None:
            broken = source_end.HandoffBroken("the receiver closed the stream")
            self._timeline.after(self._worker.latency_s, self._sending.feed, broken)

    def broken(self, reason: str) -> None:
        """The sender's process is gone."""
        self._timeline.after(self._worker.latency_s, self.feed, target_end.HandoffLost(reason))

    def _handoff(self, done: Done) -> Handoff:
        session, now = self._session, self._timeline.now
        return Handoff(
            done=done,
            transport=session.transport,
            kv_bytes=session.cut.bytes_of(session.landed),
            transfer_s=self._busy_s,
            wait_s=max(0.0, self._first_s - self._opened_s),
            exposed_s=now - self._done_s if self._done_s else 0.0,
            resends=session.num_resent,
            degradations=session.num_degradations,
        )

    def _end(self, outcome: Handoff | HandoffFailed) -> None:
        self._is_over = True
        self._deadline.stop()
        if self._patience is not None:
            self._patience.cancel()
        told: Handoff | HandoffFailed | None = outcome
        if isinstance(outcome, HandoffFailed):
            if self._is_stopped:
                told = None
            elif self._has_lost_patience:
                told = HandoffFailed("it took too long", Refusal.INTERNAL)
        self._worker.received(self._command.sequence_id, self, told)
