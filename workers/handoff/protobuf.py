"""Translates handoff messages to and from protobuf; like wire.py, the only kind of place that knows both."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from workers.errors import TransferFailed
from workers.handoff.protocol.messages import (
    CancelHandoff,
    HandoffAccepted,
    HandoffDown,
    HandoffRefused,
    HandoffUp,
    KvPiece,
    KvPieces,
    Offer,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    PrefixDone,
    PrefixSubject,
    PromptSubject,
    ReleaseHandoff,
    RunningSubject,
    SequenceMoved,
    Subject,
    TransportBroken,
    UseTransport,
)
from workers.pb import worker_pb2 as pb
from workers.wire.attach_protobuf import (
    address_from_pb,
    address_to_pb,
    hint_from_pb,
    hint_to_pb,
    layout_from_pb,
    layout_to_pb,
)
from workers.wire.request_protobuf import (
    refusal_from_name,
    request_from_pb,
    request_to_pb,
    token_logprob_from_pb,
    token_logprob_to_pb,
)


def _fill_opening(message: pb.OpenHandoff, transfer_id: str, opening: OpenHandoff) -> None:
    """In place: a prompt is not copied once more."""
    message.transfer_id = transfer_id
    message.target.CopyFrom(address_to_pb(opening.target))
    message.host = opening.host
    message.source_generation = opening.source_generation
    message.model_fingerprint = opening.model_fingerprint
    message.layout.CopyFrom(layout_to_pb(opening.layout))
    message.first_block, message.num_blocks = opening.first_block, opening.num_blocks
    message.transports.extend(opening.transports)
    message.takes_batches = opening.takes_batches
    match opening.subject:
        case PromptSubject(request, hint):
            message.prompt.CopyFrom(request_to_pb(request))
            if hint is not None:
                message.prefix_hint.CopyFrom(hint_to_pb(hint))
        case RunningSubject(request_id, permit):
            message.running.CopyFrom(pb.RunningSubject(request_id=request_id, permit=permit))
        case PrefixSubject(hashes, token_ids, parent):
            message.prefix.CopyFrom(pb.PrefixSubject(hashes=hashes, token_ids=token_ids, parent=parent))


def opening_from_pb(message: pb.OpenHandoff) -> OpenHandoff:
    """Raises TransferFailed for a subject of an unknown kind."""
    subject: Subject
    match message.WhichOneof("subject"):
        case "prompt":
            hint = hint_from_pb(message.prefix_hint) if message.HasField("prefix_hint") else None
            subject = PromptSubject(request_from_pb(message.prompt), hint)
        case "running":
            subject = RunningSubject(message.running.request_id, message.running.permit)
        case "prefix":
            prefix = message.prefix
            subject = PrefixSubject(tuple(prefix.hashes), tuple(prefix.token_ids), prefix.parent)
        case kind:
            raise TransferFailed(f"the receiver asks for something of unknown kind {kind!r}")
    return OpenHandoff(
        target=address_from_pb(message.target),
        host=message.host,
        source_generation=message.source_generation,
        model_fingerprint=message.model_fingerprint,
        layout=layout_from_pb(message.layout),
        subject=subject,
        first_block=message.first_block,
        num_blocks=message.num_blocks,
        transports=tuple(message.transports),
        takes_batches=message.takes_batches,
    )


def down_to_pb(transfer_id: str, generation: int, message: HandoffDown) -> pb.HandoffDown:
    """`generation` is the receiver's, of the moment it opened the transfer."""
    envelope = pb.HandoffDown(transfer_id=transfer_id, generation=generation)
    match message:
        case OpenHandoff():
            _fill_opening(envelope.open, transfer_id, message)
        case UseTransport(transport, epoch):
            envelope.use.transport, envelope.use.epoch = transport, epoch
            envelope.use.SetInParent()
        case PieceAck(pieces):
            envelope.ack.pieces.extend(pieces)
            envelope.ack.SetInParent()
        case ReleaseHandoff():
            envelope.release.SetInParent()
        case CancelHandoff(reason):
            envelope.cancel.CopyFrom(pb.CancelHandoff(reason=reason))
    return envelope


def down_from_pb(envelope: pb.HandoffDown) -> HandoffDown:
    """Raises TransferFailed for a message of an unknown kind."""
    match envelope.WhichOneof("message"):
        case "open":
            return opening_from_pb(envelope.open)
        case "use":
            return UseTransport(envelope.use.transport, envelope.use.epoch)
        case "ack":
            return PieceAck(tuple(envelope.ack.pieces))
        case "release":
            return ReleaseHandoff()
        case "cancel":
            return CancelHandoff(envelope.cancel.reason)
        case kind:
            raise TransferFailed(f"the receiver sent a message of unknown kind {kind!r}")


def up_to_pb(transfer_id: str, generation: int, message: HandoffUp) -> pb.HandoffUp:
    """`generation` is the sender's, of the moment it accepted the transfer."""
    envelope = pb.HandoffUp(transfer_id=transfer_id, generation=generation)
    _fill_up(envelope, message)
    return envelope


def then_to_pb(envelope: pb.HandoffUp, messages: Iterable[HandoffUp]) -> None:
    """Has `messages` said in the same write, after what the envelope says."""
    for message in messages:
        _fill_up(envelope.then.add(), message)


def _fill_up(envelope: pb.HandoffUp, message: HandoffUp) -> None:
    match message:
        case HandoffAccepted(offers, layout, host):
            envelope.accepted.host = host
            envelope.accepted.layout.CopyFrom(layout_to_pb(layout))
            for offer in offers:
                envelope.accepted.offers.add(transport=offer.transport, data=offer.data)
        case KvPieces(pieces, epoch):
            envelope.pieces.epoch = epoch
            envelope.pieces.SetInParent()
            for piece in pieces:
                envelope.pieces.pieces.add(
                    piece=piece.piece,
                    block=piece.block,
                    first_layer=piece.first_layer,
                    num_layers=piece.num_layers,
                    source_block=piece.source_block,
                    checksum=piece.checksum,
                )
        case TransportBroken(epoch, reason):
            envelope.broken.CopyFrom(pb.TransportBroken(epoch=epoch, reason=reason))
        case PrefillDone():
            done = pb.PrefillDone(
                token_id=message.token_id,
                num_pieces=message.num_pieces,
                cached_tokens=message.cached_tokens,
                prefill_s=message.prefill_s,
            )
            if message.logprob is not None:
                done.logprob.CopyFrom(token_logprob_to_pb(message.logprob))
            envelope.done.CopyFrom(done)
        case SequenceMoved(known, num_computed, num_pieces):
            moved = pb.SequenceMoved(known_token_ids=known, num_computed=num_computed, num_pieces=num_pieces)
            envelope.moved.CopyFrom(moved)
        case PrefixDone(num_blocks, num_pieces):
            envelope.prefix_done.CopyFrom(pb.PrefixDone(num_blocks=num_blocks, num_pieces=num_pieces))
        case HandoffRefused(refusal, text):
            envelope.refused.CopyFrom(pb.HandoffRefused(refusal=refusal.value, message=text))
        case CancelHandoff(reason):
            envelope.cancel.CopyFrom(pb.CancelHandoff(reason=reason))


def up_from_pb(envelope: pb.HandoffUp) -> HandoffUp:
    """Raises TransferFailed for a message of an unknown kind."""
    match envelope.WhichOneof("message"):
        case "accepted":
            offers = tuple(Offer(offer.transport, offer.data) for offer in envelope.accepted.offers)
            return HandoffAccepted(offers, layout_from_pb(envelope.accepted.layout), envelope.accepted.host)
        case "pieces":
            pieces = tuple(
                KvPiece(p.piece, p.block, p.first_layer, p.num_layers, p.source_block, p.checksum)
                for p in envelope.pieces.pieces
            )
            return KvPieces(pieces, envelope.pieces.epoch)
        case "broken":
            return TransportBroken(envelope.broken.epoch, envelope.broken.reason)
        case "done":
            done = envelope.done
            if not 0.0 <= done.prefill_s < inf:
                raise TransferFailed(f"the sender computed for {done.prefill_s} s")
            return PrefillDone(
                token_id=done.token_id,
                logprob=token_logprob_from_pb(done.logprob) if done.HasField("logprob") else None,
                num_pieces=done.num_pieces,
                cached_tokens=done.cached_tokens,
                prefill_s=done.prefill_s,
            )
        case "moved":
            moved = envelope.moved
            return SequenceMoved(tuple(moved.known_token_ids), moved.num_computed, moved.num_pieces)
        case "prefix_done":
            return PrefixDone(envelope.prefix_done.num_blocks, envelope.prefix_done.num_pieces)
        case "refused":
            return HandoffRefused(refusal_from_name(envelope.refused.refusal), envelope.refused.message)
        case "cancel":
            return CancelHandoff(envelope.cancel.reason)
        case kind:
            raise TransferFailed(f"the sender sent a message of unknown kind {kind!r}")
