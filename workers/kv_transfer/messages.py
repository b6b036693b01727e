"""What the two ends of a KV handoff say to each other; plain values, mirrored by proto/workers/pb/worker.proto."""

from __future__ import annotations

from dataclasses import dataclass

from workers.errors import Refusal
from workers.kv_transfer.memory import KvLayout, SharedHandle
from workers.request import Request, TokenLogprob
from workers.status import WorkerAddress

HEARTBEAT_S = 1.0
"""Each end says at least this often that it is alive."""


@dataclass(frozen=True, slots=True)
class OpenHandoff:
    """The receiver asks for a prompt. `target` is the receiver with the generation it opened the transfer in."""

    target: WorkerAddress
    source_generation: int
    model_fingerprint: str
    layout: KvLayout
    request: Request
    first_block: int
    transports: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UseTransport:
    """The receiver's choice, and later its wish to have all unacknowledged pieces again over this transport."""

    transport: str


@dataclass(frozen=True, slots=True)
class PieceAck:
    """These pieces are in place and verified. Empty: the receiver is alive."""

    pieces: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReleaseHandoff:
    """Everything landed; the sender may free its blocks."""


HandoffDown = OpenHandoff | UseTransport | PieceAck | ReleaseHandoff


@dataclass(frozen=True, slots=True)
class HandoffAccepted:
    """What both sides can do, best first; `shared` lets a receiver on the same host map the sender's pool."""

    transports: tuple[str, ...]
    layout: KvLayout
    shared: SharedHandle | None = None


@dataclass(frozen=True, slots=True)
class KvPiece:
    """Some layers of one block. `block` is an index in the block table; `checksum` is xxh3_64 of the bytes.

    Over shared memory `data` is empty and the receiver copies from block `source_block` of the sender's pool.
    """

    piece: int
    block: int
    first_layer: int
    num_layers: int
    source_block: int
    checksum: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class KvPieces:
    """Pieces that are complete at the sender. Empty: the sender is alive."""

    pieces: tuple[KvPiece, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt is computed; its first token. `num_pieces` is how many pieces the transfer has in all."""

    token_id: int
    logprob: TokenLogprob | None
    num_pieces: int
    cached_tokens: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class HandoffRefused:
    refusal: Refusal
    message: str


HandoffUp = HandoffAccepted | KvPieces | PrefillDone | HandoffRefused
