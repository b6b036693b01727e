"""What an engine is told, in order, and what it says back, keyed by the caller's sequence ids; plain values, knows nobody who says or hears them.

The event loop posts commands, the engine thread carries each out between two steps and reports the results of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.kv_cache.block_hash import BlockKey
from workers.request import HandoffReport, Output, Request
from workers.runner import Sampled
from workers.scheduler.sequence import Kind
from workers.status import KvEvent, Load, PrefixHint, WorkerAddress


@dataclass(frozen=True, slots=True)
class AddSequence:
    """Queue a request; one that cannot be taken is refused in the next result."""

    sequence_id: int
    request: Request
    kind: Kind
    hint: PrefixHint | None = None


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """Also releases a sequence that was computed for another worker."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class Landed:
    """The answer to a TransferWanted: the prompt's blocks are in place and verified, nothing writes into them any more."""

    sequence_id: int
    sampled: Sampled
    cached_tokens: int
    report: HandoffReport


@dataclass(frozen=True, slots=True)
class TransferLost:
    """The answer to a TransferWanted that came to nothing; nothing writes into the blocks any more."""

    sequence_id: int
    report: HandoffReport


@dataclass(frozen=True, slots=True)
class AddMigrant:
    """As IncomingKv.add_migrant."""

    sequence_id: int
    request: Request


@dataclass(frozen=True, slots=True)
class MovedIn:
    """The answer to a migrant's TransferWanted: blocks and state are here. As IncomingKv.moved_in."""

    sequence_id: int
    known_token_ids: tuple[int, ...]
    num_computed: int


@dataclass(frozen=True, slots=True)
class BeginMove:
    """Another worker takes this sequence over. As Moves.begin."""

    sequence_id: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Halt:
    """As Moves.halt."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class Resume:
    """As Moves.resume."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class EndMove:
    """As Moves.end."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """The answer to a PullWanted: so many of its blocks are in place, and nothing writes into any of them any more."""

    sequence_id: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class HoldPrefix:
    """Hold these blocks for a peer that copies them; PrefixHeld says which are there."""

    export_id: int
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class ReleasePrefix:
    """The peer copies no more."""

    export_id: int


@dataclass(frozen=True, slots=True)
class DumpKv:
    """All prefix-cache hashes for one asker, whom `StepResult.dump_askers` names."""

    asker: int = 0


@dataclass(frozen=True, slots=True)
class Wake:
    """Something beside the engine has made progress possible."""


@dataclass(frozen=True, slots=True)
class ForgetCache:
    """Empty the prefix cache."""


@dataclass(frozen=True, slots=True)
class StopEngine:
    """The thread ends after the step under way."""


EngineCommand = (
    AddSequence
    | CancelSequence
    | Landed
    | TransferLost
    | AddMigrant
    | MovedIn
    | BeginMove
    | Halt
    | Resume
    | EndMove
    | Pulled
    | HoldPrefix
    | ReleasePrefix
    | DumpKv
    | ForgetCache
    | Wake
    | StopEngine
)


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

    @property
    def has_news(self) -> bool:
        """Something has come about."""
        lists = (
            self.outputs or self.transfers or self.filled or self.prefilled or self.exports or self.abandoned or self.pulls
            or self.held or self.dump_askers
        )  # fmt: skip
        return bool(lists) or self.kv_event is not None or self.kv_dump is not None


@dataclass(frozen=True, slots=True)
class Report:
    """A result with what the engine looked like right behind it; what the engine thread tells the event loop."""

    result: StepResult
    load: Load
    counters: tuple[tuple[str, float], ...] = ()
    num_held_blocks: int = 0
    prefill_rate: float | None = None
    """Prompt tokens a second that recent steps computed; None: none yet."""
