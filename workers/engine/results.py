"""What an engine says to the world around it, keyed by the caller's sequence ids; plain values, knows nobody who says or hears them."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.kv_cache.block_hash import BlockKey
from workers.request import Output
from workers.runner import Sampled
from workers.status import KvEvent, Load, PrefixHint, WorkerAddress


@dataclass(frozen=True, slots=True)
class TransferWanted:
    """Blocks are reserved: another worker shall fill `blocks`; those before `first_block` hold the prefix already."""

    sequence_id: int
    first_block: int
    blocks: tuple[int, ...]
    hint: PrefixHint | None = None
    """Where the prefill worker can have the beginning of the prompt."""


@dataclass(frozen=True, slots=True)
class PullWanted:
    """Blocks are reserved: the peer shall fill `blocks` from number `first_block` on with what `keys` name."""

    sequence_id: int
    peer: WorkerAddress
    first_block: int
    blocks: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    prefill_tokens_per_s: float
    """How fast we would compute them instead, measured; 0: not measured yet."""


@dataclass(frozen=True, slots=True)
class PrefixHeld:
    """These blocks hold the beginning of what `hold_prefix` asked for, until `release_prefix`."""

    export_id: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksFilled:
    """A prompt computed for another worker has its first `num_filled` blocks complete."""

    sequence_id: int
    blocks: tuple[int, ...]
    num_filled: int


@dataclass(frozen=True, slots=True)
class LayersFilled:
    """In mid-step: of a prompt computed for another worker, entries first .. end-1 of its block table hold the KV of their
    first `num_layers` layers."""

    sequence_id: int
    blocks: tuple[int, ...]
    first: int
    end: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt computed for another worker is done; its blocks are held until `cancel`."""

    sequence_id: int
    sampled: Sampled
    cached_tokens: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class BlocksFinal:
    """Entries first .. end-1 of the block table of a sequence that is being moved will not change any more."""

    sequence_id: int
    blocks: tuple[int, ...]
    first: int
    end: int
    is_all: bool
    """Nothing else is final yet."""


@dataclass(frozen=True, slots=True)
class Halted:
    """A sequence stands still for its migration, all of its blocks are final; `num_computed` tokens are in them."""

    sequence_id: int
    known_token_ids: tuple[int, ...]
    num_computed: int


@dataclass(frozen=True, slots=True)
class ExportEnded:
    """A sequence that was being moved will not be, because of something that happened here."""

    sequence_id: int
    reason: str


ExportEvent = BlocksFinal | Halted | ExportEnded


@dataclass(slots=True)
class StepResult:
    """Everything that came about since the result before, most of it in one step."""

    outputs: list[tuple[int, Output]] = field(default_factory=list)
    transfers: list[TransferWanted] = field(default_factory=list)
    filled: list[BlocksFilled] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    exports: list[ExportEvent] = field(default_factory=list)
    """Of sequences that other workers take over."""
    abandoned: list[int] = field(default_factory=list)
    """Sequences that were cancelled while another worker's bytes were on their way: their blocks stay reserved until
    `Incoming.failed` or `Incoming.pulled` confirms that nothing writes into them any more."""
    pulls: list[PullWanted] = field(default_factory=list)
    held: list[PrefixHeld] = field(default_factory=list)
    kv_event: KvEvent | None = None
    """What changed in the prefix cache since the event before."""
    kv_dump: KvEvent | None = None
    """All that is in the prefix cache, for `dump_askers`. To be read before `kv_event`, which may repeat some of it."""
    dump_askers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """A result with what the engine looked like right behind it; what the engine thread tells the event loop."""

    result: StepResult
    load: Load
    counters: tuple[tuple[str, float], ...] = ()
    num_held_blocks: int = 0
    prefill_rate: float | None = None
    """Prompt tokens a second that recent steps computed; None: none yet."""
