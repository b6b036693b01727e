"""What a worker says about itself: identity, role, load and the blocks it caches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

from workers.limits import DEFAULT_LIMITS, RequestLimits


class Role(StrEnum):
    """PREFILL computes prompts for others, DECODE generates tokens, MIXED does both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def can_prefill(self) -> bool:
        """Accepts handoffs from decode workers."""
        return self is not Role.DECODE

    @property
    def can_decode(self) -> bool:
        """Accepts requests from routers."""
        return self is not Role.PREFILL


_SWITCH_BITS = 32
"""Of a generation: what is above them counts the worker's starts, they count its role switches and lost ranks since. A switch a second
fills them in 136 years."""


def first_generation(start_count: int) -> int:
    """That of a process which is its worker's `start_count`-th."""
    return start_count << _SWITCH_BITS


def starts_of(generation: int) -> int:
    """How often the worker's process was started; role switches and lost ranks leave it as it is."""
    return generation >> _SWITCH_BITS


def switches_of(generation: int) -> int:
    """Role switches and lost ranks since that start."""
    return generation & ((1 << _SWITCH_BITS) - 1)


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Who and where: `target` is host:port of the worker's gRPC server; `generation` fences stale parties."""

    worker_id: str
    generation: int
    target: str


@dataclass(frozen=True, slots=True)
class PrefixHint:
    """`peer` is believed to hold the first `num_blocks` blocks of a prompt in its pool; it may be wrong."""

    peer: WorkerAddress
    num_blocks: int


class Load(NamedTuple):
    """A worker's load after a step; counts at one instant. A tuple, as Output is: one is made for every step."""

    num_waiting: int = 0
    num_running: int = 0
    num_transferring: int = 0
    waiting_prefill_tokens: int = 0
    """Prompt tokens accepted and not yet computed."""
    num_free_blocks: int = 0
    """Free or evictable KV blocks."""
    num_blocks: int = 0
    step_s: float = 0.0
    """Duration of the last step; what it computed follows."""
    step_decodes: int = 0
    """Sequences that got a token."""
    step_context: int = 0
    """Tokens of these sequences together, whose KV was read."""
    step_prompt_tokens: int = 0
    step_prompt_context: int = 0
    """Tokens that the step's prompt tokens looked back at, each at its own: a chunk of n tokens after m others has n * (m + n / 2)."""


NUM_COUNTS = 6
"""The first fields of a Load; the others are about its last step."""


class Tier(IntEnum):
    """Where a worker keeps the KV of a prefix block; a lower number is faster to use."""

    POOL = 0
    HOST = 1
    DISK = 2


@dataclass(frozen=True, slots=True)
class KvEvent:
    """Prefix-cache blocks that appeared, changed their tier or went since the last frame; `reset` means "this is the full set".

    Hashes are those of workers.kv_cache.block_hash. `sequence` rises by one per event; a gap means: ask for a dump.
    """

    sequence: int
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    """Blocks that are in no tier any more."""
    reset: bool = False
    tiers: tuple[Tier, ...] = ()
    """The fastest tier of each of `stored`; empty: all are in the pool."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a router must know of the model that a worker serves. `fingerprint` covers weights' config, dtype and KV layout."""

    name: str
    fingerprint: str
    vocab_size: int
    max_model_len: int
    block_size: int
    grammars: str = ""
    """What reads grammars (workers.grammar.language.engine_name); empty: requests with one are refused."""
    limits: RequestLimits = DEFAULT_LIMITS
    """What the worker takes of lists in a request."""


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank of a worker that is several processes. `epoch` is that of the group; a rank that is gone has none (0)."""

    rank: int
    host: str = ""
    pid: int = 0
    epoch: int = 0
    is_alive: bool = False
    shares_memory: bool = True
    """Its KV is in the leader's memory; otherwise it is on another host, and its KV is moved there and back."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The whole public state of a worker."""

    worker_id: str
    generation: int
    role: Role
    model: ModelInfo
    load: Load
    pid: int = 0
    host: str = ""
    kv_block_bytes: int = 0
    counters: tuple[tuple[str, float], ...] = ()
    """Monotonic totals such as ("preemptions", 3)."""
    is_draining: bool = False
    """Takes no new work; what runs there is to be moved or finishes."""
    ranks: tuple[RankStatus, ...] = ()
    """Of a worker that is a group; empty: it is one process."""
    is_rebuilding: bool = False
    """A rank is missing: nothing is accepted until the group is whole again."""
    max_num_seqs: int = 0
    """Sequences that run at once; what comes beyond waits there. 0: not said."""
    max_batch_tokens: int = 0
    """Tokens that one step computes at most, of prompts and of decoding sequences. 0: not said."""
    num_routers: int = 0
    """Routers that have sent it requests in the last seconds; where none has, those that are attached. 0: not said."""


class LoadProgress(NamedTuple):
    """How far a process has come with its checkpoint. Totals are what it will read itself; a layer counts from its first tensor on."""

    num_bytes_read: int = 0
    num_bytes: int = 0
    num_layers_begun: int = 0
    num_layers: int = 0


@dataclass(slots=True)
class Identity:
    """Who the worker is now; the worker owns it, others read."""

    worker_id: str
    role: Role
    generation: int
    target: str = ""
    is_draining: bool = False
    """Takes no new work."""
    is_rebuilding: bool = False
    """A rank is missing; nothing new is accepted."""

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(self.worker_id, self.generation, self.target)
