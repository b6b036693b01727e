"""What the leader and the ranks of a group say to each other, and its bytes: a JSON header and a tail of plain bytes. Knows no socket.

No object is ever built from what the header names other than the messages of this file.
"""

from __future__ import annotations

import dataclasses
import json
import types
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from workers.errors import BatonError

MAX_FRAME_BYTES = 256 << 20
"""Header and tail together; a step's token ids and its results are far smaller."""


class BadMessage(BatonError):
    """The peer's fault: bytes that are no message."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank introduces itself to the leader. `token` proves that it was started for this group."""

    rank: int
    size: int
    token: str
    pid: int
    host: str
    fingerprint: str
    """Of the weights that it holds already; empty: it has to load."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The leader accepts a rank: what to load. Experts by mixture layer and global slot."""

    num_blocks: int
    slots: list[list[int]]
    pool_pid: int
    """Where a rank on the leader's host finds the memory of all pools: /proc/<pid>/fd/<fd>, proven by the nonce (hex)."""
    pool_fd: int
    pool_bytes: int
    pool_nonce: str


@dataclass(frozen=True, slots=True)
class Declined:
    """The leader does not accept a rank; it should not try again."""

    message: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank is loaded and idle, and can form the next epoch."""

    fingerprint: str
    expert_bytes: int = 0
    shares_memory: bool = True
    """It has joined the leader's memory; otherwise it is on another host and keeps its KV to itself."""
    offers_direct: bool = False
    """It can bring rows to experts without the host (workers.model.direct_dispatch) in the next epoch."""
    kernels: str = ""
    """What it computes with, which the fingerprint covers."""


@dataclass(frozen=True, slots=True)
class Form:
    """Every rank meets the others in this epoch, with this placement and in this role."""

    epoch: int
    store_host: str
    store_port: int
    slots: list[list[int]]
    role: str
    generation: int
    direct: bool = False
    """All ranks have offered it."""


@dataclass(frozen=True, slots=True)
class Formed:
    epoch: int


@dataclass(frozen=True, slots=True)
class Abort:
    """The epoch is over: whatever waits in it must stop waiting."""

    epoch: int
    message: str


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank does next; `tail` is its part of the batch. All ranks get the same but for the tail.

    `role` and `generation` hold from this step on. With `moved_layer` >= 0, that mixture layer first gets
    `moved_slots`.
    """

    epoch: int
    number: int
    role: str
    generation: int
    halves: bool
    wants_load: bool
    moved_layer: int
    moved_slots: list[int]
    num_prefill: int
    num_decode: int
    """Tokens of prompts and of decode, over all ranks."""
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class Done:
    """A rank has computed its part; `tail` holds the results where it answers for its pool."""

    epoch: int
    number: int
    step_s: float
    generation: int
    sent_bytes: int
    """What this rank has sent to others in the epoch's exchanges so far."""
    load: list[list[int]]
    """Tokens that chose each expert, where asked for."""
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank could not form an epoch or compute its step. `is_broken`: only because the group broke."""

    epoch: int
    message: str
    is_broken: bool


@dataclass(frozen=True, slots=True)
class GetBlocks:
    """The leader wants what a rank holds of some blocks, by the rank's own numbers: in the leader's memory if it has joined
    that, else in the answer."""

    blocks: list[int]
    epoch: int = 0
    """A rank that is no longer in it does nothing: the blocks may have another owner."""
    number: int = 0
    """The answer repeats it: one that comes too late answers nothing else."""


@dataclass(frozen=True, slots=True)
class PutBlocks:
    """A rank takes over what it is to hold of some blocks: from the leader's memory if it has joined that, else from `tail`."""

    blocks: list[int]
    epoch: int = 0
    number: int = 0
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The answer to either: the bytes asked for, or none."""

    number: int = 0
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, both ways."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The group ends; a rank that gets this returns."""


Message = (
    Hello | Welcome | Declined | Ready | Form | Formed | Abort | Step | Done | Failed | GetBlocks | PutBlocks | Blocks | Beat
    | Stop
)  # fmt: skip
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}
_FIELDS = {name: get_type_hints(kind) for name, kind in _KINDS.items()}


def encode(message: Message) -> bytes:
    """The frame of a message: length of header, length of tail (4 bytes each, little endian), header, tail."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    tail = fields.pop("tail", b"")
    header = json.dumps([type(message).__name__, fields], separators=(",", ":")).encode()
    frame: bytes = len(header).to_bytes(4, "little") + len(tail).to_bytes(4, "little") + header + tail
    return frame


def lengths(prefix: bytes) -> tuple[int, int]:
    """Lengths of header and tail from a frame's first 8 bytes. Raises BadMessage above the bound."""
    header, tail = int.from_bytes(prefix[:4], "little"), int.from_bytes(prefix[4:8], "little")
    if header + tail > MAX_FRAME_BYTES:
        raise BadMessage(f"a frame of {header + tail} bytes is above the bound of {MAX_FRAME_BYTES}")
    return header, tail


def decode(header: bytes, tail: bytes) -> Message:
    """Raises BadMessage when the bytes are no message of this file."""
    try:
        name, fields = json.loads(header)
        kind, hints = _KINDS[name], _FIELDS[name]
        if "tail" in hints:
            fields["tail"] = tail
        if set(fields) - set(hints) or not all(_fits(value, hints[key]) for key, value in fields.items()):
            raise BadMessage(f"a {name} has fields that do not fit")
        message: Message = kind(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise BadMessage(f"not a message: {error}") from error
    return message


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
