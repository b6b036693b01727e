"""What the leader and the ranks of a group say to each other; plain values, knows no bytes and no socket."""

from __future__ import annotations

from dataclasses import dataclass

from workers.errors import BatonError


class BadMessage(BatonError):
    """The peer's fault: bytes that are no message."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank introduces itself to the leader, which knows already that it is one of this group."""

    rank: int
    size: int
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
    """It can bring rows to experts without the host (workers.model.parallel.direct_dispatch) in the next epoch."""
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
