"""Translates handoff messages to and from protobuf; like wire.py, the only kind of place that knows both."""

from __future__ import annotations

from workers.errors import TransferFailed
from workers.kv_transfer.messages import (
    HandoffAccepted,
    HandoffDown,
    HandoffRefused,
    HandoffUp,
    KvPiece,
    KvPieces,
    OpenHandoff,
    PieceAck,
    PrefillDone,
    ReleaseHandoff,
    UseTransport,
)
from workers.pb import worker_pb2 as pb
from workers.wire import (
    address_from_pb,
    address_to_pb,
    layout_from_pb,
    layout_to_pb,
    refusal_from_name,
    request_from_pb,
    request_to_pb,
    shared_handle_from_pb,
    shared_handle_to_pb,
    token_logprob_from_pb,
    token_logprob_to_pb,
)


def down_to_pb(transfer_id: str, generation: int, message: HandoffDown) -> pb.HandoffDown:
    """`generation` is the receiver's, of the moment it opened the transfer."""
    envelope = pb.HandoffDown(transfer_id=transfer_id, generation=generation)
    match message:
        case OpenHandoff():
            envelope.open.CopyFrom(
                pb.OpenHandoff(
                    transfer_id=transfer_id,
                    target=address_to_pb(message.target),
                    source_generation=message.source_generation,
                    model_fingerprint=message.model_fingerprint,
                    layout=layout_to_pb(message.layout),
                    request=request_to_pb(message.request),
                    first_block=message.first_block,
                    transports=message.transports,
                )
            )
        case UseTransport(transport):
            envelope.use.CopyFrom(pb.UseTransport(transport=transport))
        case PieceAck(pieces):
            envelope.ack.CopyFrom(pb.PieceAck(pieces=pieces))
        case ReleaseHandoff():
            envelope.release.CopyFrom(pb.ReleaseHandoff())
    return envelope


def down_from_pb(envelope: pb.HandoffDown) -> HandoffDown:
    """Raises TransferFailed for a message of an unknown kind."""
    match envelope.WhichOneof("message"):
        case "open":
            message = envelope.open
            return OpenHandoff(
                target=address_from_pb(message.target),
                source_generation=message.source_generation,
                model_fingerprint=message.model_fingerprint,
                layout=layout_from_pb(message.layout),
                request=request_from_pb(message.request),
                first_block=message.first_block,
                transports=tuple(message.transports),
            )
        case "use":
            return UseTransport(envelope.use.transport)
        case "ack":
            return PieceAck(tuple(envelope.ack.pieces))
        case "release":
            return ReleaseHandoff()
        case kind:
            raise TransferFailed(f"the receiver sent a message of unknown kind {kind!r}")


def up_to_pb(transfer_id: str, generation: int, message: HandoffUp) -> pb.HandoffUp:
    """`generation` is the sender's, of the moment it accepted the transfer."""
    envelope = pb.HandoffUp(transfer_id=transfer_id, generation=generation)
    match message:
        case HandoffAccepted():
            accepted = pb.HandoffAccepted(transports=message.transports, layout=layout_to_pb(message.layout))
            if message.shared is not None:
                accepted.shared.CopyFrom(shared_handle_to_pb(message.shared))
            envelope.accepted.CopyFrom(accepted)
        case KvPieces(pieces):
            envelope.pieces.SetInParent()
            for piece in pieces:
                envelope.pieces.pieces.add(
                    piece=piece.piece,
                    block=piece.block,
                    first_layer=piece.first_layer,
                    num_layers=piece.num_layers,
                    source_block=piece.source_block,
                    checksum=piece.checksum,
                    data=piece.data,
                )
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
        case HandoffRefused(refusal, text):
            envelope.refused.CopyFrom(pb.HandoffRefused(refusal=refusal.value, message=text))
    return envelope


def up_from_pb(envelope: pb.HandoffUp) -> HandoffUp:
    """Raises TransferFailed for a message of an unknown kind."""
    match envelope.WhichOneof("message"):
        case "accepted":
            accepted = envelope.accepted
            shared = shared_handle_from_pb(accepted.shared) if accepted.HasField("shared") else None
            return HandoffAccepted(tuple(accepted.transports), layout_from_pb(accepted.layout), shared)
        case "pieces":
            return KvPieces(
                tuple(
                    KvPiece(p.piece, p.block, p.first_layer, p.num_layers, p.source_block, p.checksum, p.data)
                    for p in envelope.pieces.pieces
                )
            )
        case "done":
            done = envelope.done
            return PrefillDone(
                token_id=done.token_id,
                logprob=token_logprob_from_pb(done.logprob) if done.HasField("logprob") else None,
                num_pieces=done.num_pieces,
                cached_tokens=done.cached_tokens,
                prefill_s=done.prefill_s,
            )
        case "refused":
            return HandoffRefused(refusal_from_name(envelope.refused.refusal), envelope.refused.message)
        case kind:
            raise TransferFailed(f"the sender sent a message of unknown kind {kind!r}")
