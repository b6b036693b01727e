"""What an engine is told, in order, by the thread that looks after requests and transfers; plain values, knows nobody who says or hears them.

The counterpart of workers.engine.results. The event loop posts them, the engine thread carries each out between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.kv_cache.block_hash import BlockKey
from workers.request import HandoffReport, Request
from workers.runner import Sampled
from workers.scheduler.sequence import Kind
from workers.status import PrefixHint


@dataclass(frozen=True, slots=True)
class Add:
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
    """As Incoming.add_migrant."""

    sequence_id: int
    request: Request


@dataclass(frozen=True, slots=True)
class MovedIn:
    """The answer to a migrant's TransferWanted: blocks and state are here. As Incoming.moved_in."""

    sequence_id: int
    known_token_ids: tuple[int, ...]
    num_computed: int


@dataclass(frozen=True, slots=True)
class Export:
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
class Depart:
    """As Moves.depart."""

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
class Stop:
    """The thread ends after the step under way."""


EngineCommand = (
    Add
    | CancelSequence
    | Landed
    | TransferLost
    | AddMigrant
    | MovedIn
    | Export
    | Halt
    | Resume
    | Depart
    | Pulled
    | HoldPrefix
    | ReleasePrefix
    | DumpKv
    | ForgetCache
    | Wake
    | Stop
)
