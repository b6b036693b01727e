"""Recognises the steps of a request in the messages that pass between router and workers. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from chaos.faults import Step
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2 as pb
from workers.wire.attach_protobuf import layout_from_pb


@dataclass(slots=True)
class HandoffWatch:
    """One Handoff stream: whom it is for, and how far it has come."""

    source: str
    target: str = ""
    wire_id: str = ""
    transfer_id: str = ""
    transports: tuple[str, ...] = ()
    num_pieces: int = 0
    is_released: bool = False
    is_move: bool = False
    """A running sequence is handed over, not a prompt."""
    _announced: set[int] = field(default_factory=set)
    _acked: set[int] = field(default_factory=set)

    def down(self, raw: bytes) -> tuple[Step, ...]:
        """The steps that this message of the receiver marks; a short transfer has several in one."""
        message = pb.HandoffDown.FromString(raw)
        match message.WhichOneof("message"):
            case "open":
                opening = message.open
                self.is_move = opening.HasField("running")
                subject = opening.running if self.is_move else opening.prompt
                self.target, self.wire_id = opening.target.worker_id, subject.request_id
                self.transfer_id = message.transfer_id
                layout = layout_from_pb(opening.layout)
                self.num_pieces = Cut(layout, opening.first_block, opening.num_blocks).num_pieces
                return (Step.OPEN,)
            case "use":
                self.transports = (*self.transports, message.use.transport)
                return (Step.CHOSEN,)
            case "ack" if message.ack.pieces:
                before = len(self._acked)
                self._acked.update(message.ack.pieces)
                first = () if before else (Step.FIRST_ACK,)
                return (*first, Step.MIDDLE_ACK) if before < self.num_pieces / 2 <= len(self._acked) else first
            case "release":
                self.is_released = True
                return (Step.RELEASE,)
        return ()

    def up(self, raw: bytes) -> tuple[Step, ...]:
        """The steps that this message of the sender marks."""
        envelope = pb.HandoffUp.FromString(raw)
        return tuple(step for message in (envelope, *envelope.then) for step in self._up(message))

    def _up(self, message: pb.HandoffUp) -> tuple[Step, ...]:
        match message.WhichOneof("message"):
            case "accepted":
                return (Step.ACCEPTED,)
            case "pieces" if message.pieces.pieces:
                before = len(self._announced)
                self._announced.update(piece.piece for piece in message.pieces.pieces)
                first = () if before else (Step.FIRST_PIECE,)
                middle = (Step.MIDDLE_PIECE,) if before < self.num_pieces / 2 <= len(self._announced) else ()
                last = (Step.LAST_PIECE,) if len(self._announced) >= self.num_pieces else ()
                return (*first, *middle, *last)
            case "done" | "moved":
                return (Step.DONE,)
        return ()


@dataclass(slots=True)
class AttachWatch:
    """One Attach stream: how much output each request has had on it."""

    decode: str
    max_tokens: dict[str, int] = field(default_factory=dict)
    _num_tokens: dict[str, int] = field(default_factory=dict)

    def down(self, raw: bytes) -> list[tuple[str, Step]]:
        """The (wire id, step) pairs of a message of the router."""
        message = pb.RouterMessage.FromString(raw)
        if message.WhichOneof("message") != "submit":
            return []
        request = message.submit.request
        if message.submit.HasField("migration"):
            return [(request.request_id, Step.MOVE)]
        self.max_tokens[request.request_id] = request.params.max_tokens - len(request.replay_token_ids)
        return [(request.request_id, Step.SUBMIT)]

    def up(self, raw: bytes) -> list[tuple[str, Step]]:
        """The (wire id, step) pairs of a frame."""
        steps: list[tuple[str, Step]] = []
        for output in pb.WorkerFrame.FromString(raw).outputs:
            name = output.request_id
            before = self._num_tokens.get(name, 0)
            now = self._num_tokens[name] = before + len(output.token_ids)
            if not before and now:
                steps.append((name, Step.FIRST_TOKEN))
            if before < self.max_tokens.get(name, 0) / 2 <= now:
                steps.append((name, Step.MIDDLE_TOKEN))
            if output.finish_reason:
                steps.append((name, Step.LAST_TOKEN))
                self._num_tokens.pop(name, None)
                self.max_tokens.pop(name, None)
        return steps
