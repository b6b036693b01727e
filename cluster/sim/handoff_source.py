"""The sending end of simulated handoffs: what workers.handoff.source_driver does with streams and transports, here with the simulated network, around the same session."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from cluster.sim.handoff_target import TRANSPORTS, Deadline, Receiving
from cluster.sim.network import Pipe
from cluster.sim.product import (
    Cut,
    Due,
    HandoffAccepted,
    HandoffRefused,
    HandoffUp,
    KvPiece,
    Offer,
    OpenHandoff,
    SourceSession,
    TransferState,
    source_end,
    worker_events,
)

if TYPE_CHECKING:
    from cluster.sim.worker import SimWorker


class Sending:
    """A handoff that is served: the loop around one SourceSession."""

    def __init__(
        self, worker: SimWorker, transfer: int, receiving: Receiving, opening: OpenHandoff, is_paced: bool
    ) -> None:
        self._worker = worker
        self._transfer = transfer
        self._receiving = receiving
        self._is_paced = is_paced
        self._timeline = worker.world.timeline
        self._target = opening.target.worker_id
        self._up = Pipe(worker.world.network, worker.name, self._target, receiving.damaged_above)
        offers = tuple(Offer(name, b"") for name in TRANSPORTS if name in opening.transports)
        self._session = SourceSession(
            Cut(worker.layout, opening.first_block, opening.num_blocks),
            HandoffAccepted(offers, worker.layout, worker.name),
            worker.config.transfer_timeout_s,
            worker.config.transfer_window_bytes,
        )
        self._deadline = Deadline(worker, self._session.next_deadline_s, lambda: self.feed(Due()))
        self._is_over = False

    def start(self) -> None:
        self._carry_out(self._session.open(self._timeline.now))

    def feed(self, event: source_end.SourceEvent) -> None:
        if self._worker.defer(self.feed, event) or self._is_over:
            return
        self._carry_out(self._session.handle(event, self._timeline.now))

    def _carry_out(self, commands: list[source_end.SourceCommand]) -> None:
        pending = deque(commands)
        while pending:
            match pending.popleft():
                case source_end.SendUp(message):
                    self._say(message)
                case source_end.SendPieces() as command:
                    pending += self._session.handle(self._send_pieces(command), self._timeline.now)
                case source_end.StartExport():
                    self._worker.handle(worker_events.HandoffBegun(self._transfer))
                case source_end.Release(reason):
                    self._is_over = True
                    self._deadline.stop()
                    self._worker.sent(self._transfer, reason)
                    return
        if self._is_paced and self._session.state is TransferState.SENDING:
            num_pieces = len(self._session.acknowledged)
            self._worker.handle(worker_events.HandoffAcknowledged(self._transfer, num_pieces))
        if not self._is_over:
            self._deadline.look()

    def _say(self, message: HandoffUp) -> None:
        self._up.send(self._worker.latency_s, self._receiving.feed, message)

    def _send_pieces(self, command: source_end.SendPieces) -> source_end.Described:
        cut, epoch, pieces = self._session.cut, command.epoch, command.pieces
        numbers = tuple([number for number, _ in pieces])
        num_bytes = cut.bytes_of(numbers)
        described = tuple([KvPiece(number, *cut.slot(number), block, 0) for number, block in pieces])
        layers = self._worker.memory.content.layers
        contents = [
            [layer[piece.source_block] for layer in layers[piece.first_layer : piece.first_layer + piece.num_layers]]
            for piece in described
        ]

        def arrived() -> None:
            self._receiving.arrived(epoch, numbers, contents)
            self.feed(source_end.Sent(epoch))

        def lost() -> None:
            self._receiving.lost(epoch, numbers)
            self.feed(source_end.Sent(epoch, "the connection broke"))

        self._worker.world.network.move(self._worker.name, self._target, num_bytes, arrived, lost)
        return source_end.Described(epoch, described)

    def abandon(self) -> None:
        """The sender's process is gone."""
        self._is_over = True
        self._up.is_closed = True
        self._deadline.stop()
        self._receiving.broken("the sender was lost")


def refuse(worker: SimWorker, receiving: Receiving, refused: worker_events.RefuseHandoff) -> None:
    """Says that the handoff is not served."""
    pipe = Pipe(worker.world.network, worker.name, receiving.name, receiving.damaged_above)
    pipe.send(worker.latency_s, receiving.feed, HandoffRefused(refused.refusal, refused.message))
