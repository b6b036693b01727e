"""What the two ends of a KV handoff say to each other; plain values, mirrored by proto/workers/pb/worker.proto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from workers.errors import Refusal, Refused, TransferFailed
from workers.kv_cache.block_hash import BlockKey, token_bytes, token_ids
from workers.kv_memory.memory import KvLayout
from workers.request import Request
from workers.runner import BLOCK_SIZE
from workers.status import PrefixHint, WorkerAddress
from workers.token_logprobs import TokenLogprob

# ---- what is handed over ----


@dataclass(frozen=True, slots=True)
class PromptSubject:
    """Compute this prompt and hand over its KV and its first token."""

    request: Request
    hint: PrefixHint | None = None
    """Where the beginning of the prompt can be had."""

    @property
    def log_fields(self) -> Mapping[str, str]:
        """What log messages about it carry."""
        return self.request.log_fields


@dataclass(frozen=True, slots=True)
class RunningSubject:
    """Hand over a sequence that runs at the sender; `request_id` is as the router named it there, and the router has made `permit`
    for the receiver (workers/trust/permits.py)."""

    request_id: str
    permit: bytes = b""

    @property
    def log_fields(self) -> Mapping[str, str]:
        return {"request_id": self.request_id}


@dataclass(frozen=True, slots=True)
class PrefixSubject:
    """Hand over the longest run of these prefix-cache blocks, from the first on, that the sender holds.

    `hashes` are those of workers.kv_cache.block_hash, of the blocks from `first_block` on.
    """

    hashes: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    """Of all these blocks: a hash alone is not believed."""
    parent: int = 0
    """Hash of the block before the first one; 0: there is none."""

    @property
    def log_fields(self) -> Mapping[str, str]:
        """Blocks are nobody's in particular."""
        return {}


Subject = PromptSubject | RunningSubject | PrefixSubject


# ---- from the receiver to the sender ----


@dataclass(frozen=True, slots=True)
class OpenHandoff:
    """The receiver asks. `target` is the receiver with the generation it opened the transfer in, `host` its host name.

    It has reserved homes for `num_blocks` blocks from entry `first_block` of the block table on.
    """

    target: WorkerAddress
    host: str
    source_generation: int
    model_fingerprint: str
    layout: KvLayout
    subject: Subject
    first_block: int
    num_blocks: int
    transports: tuple[str, ...]
    """What the receiver can do, best first."""
    takes_batches: bool = False
    """Several messages may come in one write; releases before this cannot read that."""


@dataclass(frozen=True, slots=True)
class UseTransport:
    """The receiver is connected over this transport: send everything over it that is not acknowledged.

    `epoch` rises with each choice; announcements of an earlier epoch mean nothing any more.
    """

    transport: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class PieceAck:
    """These pieces are in place and verified. Empty: the receiver is alive."""

    pieces: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReleaseHandoff:
    """Everything landed; the sender may free its blocks."""


@dataclass(frozen=True, slots=True)
class CancelHandoff:
    """Whoever says this has given the transfer up; both ends say it."""

    reason: str


HandoffDown = OpenHandoff | UseTransport | PieceAck | ReleaseHandoff | CancelHandoff


# ---- from the sender to the receiver ----


@dataclass(frozen=True, slots=True)
class Offer:
    """A transport that the sender can serve this receiver with, and what the receiver needs to connect."""

    transport: str
    data: bytes


@dataclass(frozen=True, slots=True)
class HandoffAccepted:
    """`host` is the sender's host name."""

    offers: tuple[Offer, ...]
    layout: KvLayout
    host: str


class KvPiece(NamedTuple):
    """Some layers of one block. `block` is an index in the block table, `source_block` the block in the sender's pool;
    `checksum` is xxh3_64 of the bytes, which travel over the transport. A tuple, whose middle is a Slot: a prompt has thousands."""

    piece: int
    block: int
    first_layer: int
    num_layers: int
    source_block: int
    checksum: int


@dataclass(frozen=True, slots=True)
class KvPieces:
    """Pieces that are complete at the sender. Empty: the sender is alive."""

    pieces: tuple[KvPiece, ...] = ()
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class TransportBroken:
    """The sender could not send over the transport of this epoch."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt is computed; its first token. `num_pieces` is how many pieces the transfer has in all."""

    token_id: int
    logprob: TokenLogprob | None
    num_pieces: int
    cached_tokens: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class SequenceMoved:
    """The sequence stands still at the sender. `known_token_ids` are its output tokens so far; `num_computed` tokens of
    prompt and output have their KV in the blocks."""

    known_token_ids: tuple[int, ...]
    num_computed: int
    num_pieces: int


@dataclass(frozen=True, slots=True)
class PrefixDone:
    """The sender holds, and has announced, the first `num_blocks` of the blocks asked for."""

    num_blocks: int
    num_pieces: int


Done = PrefillDone | SequenceMoved | PrefixDone


@dataclass(frozen=True, slots=True)
class HandoffRefused:
    refusal: Refusal
    message: str


HandoffUp = HandoffAccepted | KvPieces | TransportBroken | Done | HandoffRefused | CancelHandoff


@dataclass(frozen=True, slots=True)
class Handoff:
    """What landed. Times are measured at the receiver: `wait_s` from opening to the first announcement, `transfer_s` while
    pieces were on their way or being verified, `exposed_s` from the done message to the last piece in its place."""

    done: Done
    transport: str
    kv_bytes: int
    transfer_s: float
    wait_s: float = 0.0
    exposed_s: float = 0.0
    resends: int = 0
    degradations: int = 0


class HandoffFailed(TransferFailed):
    """A transfer that did not land; `refusal` names why, the counts what was tried."""

    def __init__(self, reason: str, refusal: Refusal, resends: int = 0, degradations: int = 0) -> None:
        super().__init__(reason)
        self.refusal = refusal
        self.resends = resends
        self.degradations = degradations


def keys_of(subject: PrefixSubject) -> tuple[BlockKey, ...]:
    """The blocks a receiver asks for. Raises Refused when hashes and tokens do not fit together."""
    hashes, tokens = subject.hashes, subject.token_ids
    if len(tokens) != len(hashes) * BLOCK_SIZE:
        raise Refused(Refusal.INVALID, f"{len(hashes)} blocks come with {len(tokens)} tokens")
    parents, written, size = (subject.parent, *hashes[:-1]), token_bytes(tokens), 4 * BLOCK_SIZE
    starts = range(0, len(written), size)
    return tuple(
        BlockKey(block_hash, parent, written[start : start + size])
        for block_hash, parent, start in zip(hashes, parents, starts, strict=True)
    )


def subject_of(keys: tuple[BlockKey, ...]) -> PrefixSubject:
    """How to ask for a run of blocks."""
    tokens = tuple(token_ids(b"".join([key.tokens for key in keys])))
    return PrefixSubject(tuple([key.block_hash for key in keys]), tokens, keys[0].parent)
