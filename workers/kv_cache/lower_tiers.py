"""What the cache manager asks of those that keep blocks outside the pool: tiers below it, and other workers. Knows no bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.kv_cache.block_hash import BlockKey
from workers.kv_cache.prefix_cache import Ledger
from workers.status import Tier


@dataclass(slots=True, eq=False)
class Promotion:
    """A run of prefix blocks on their way from lower tiers into reserved pool blocks; `blocks[i]` is for `keys[i]`."""

    keys: tuple[BlockKey, ...]
    blocks: tuple[int, ...]
    arrived: set[int] = field(default_factory=set)
    """Positions in `keys` whose bytes are in place and verified."""
    end: int = -1
    """What is at this position and behind it does not come: a run with a hole is of no use."""

    def __post_init__(self) -> None:
        self.end = len(self.keys)

    def fail(self, index: int) -> None:
        self.end = min(self.end, index)

    @property
    def num_arrived(self) -> int:
        """Length of the run that is in place, from its beginning."""
        return next((index for index in range(self.end) if index not in self.arrived), self.end)

    @property
    def is_done(self) -> bool:
        return self.num_arrived == self.end


@dataclass(slots=True, eq=False)
class Pull:
    """A run of prefix blocks on their way from another worker's pool into reserved blocks of ours."""

    keys: tuple[BlockKey, ...]
    first_block: int
    """Where they belong in the block table."""
    num_arrived: int | None = None
    """None: under way, and somebody may write into the blocks."""


class LowerTiers(Protocol):
    """Used from the engine's thread. Nothing here waits for a disk."""

    @property
    def ledger(self) -> Ledger: ...

    @property
    def blocks_per_bite(self) -> int:
        """What may be demoted between two steps, where it can wait."""

    def demote(self, evicted: Sequence[tuple[int, BlockKey]]) -> None:
        """These pool blocks are about to be overwritten: copies what is to be kept, before it returns."""

    def holds(self, key: BlockKey) -> Tier | None:
        """The tier that could bring the block back."""

    def pin(self, keys: Sequence[BlockKey]) -> None:
        """Holds blocks in their tier until `unpin`; counted."""

    def unpin(self, keys: Sequence[BlockKey]) -> None: ...

    def begin(self, promotion: Promotion) -> None:
        """Brings pinned blocks back, some with each look for what has come."""

    def promoted(self, key: BlockKey) -> None:
        """The pool holds the block again."""

    def abandon(self, promotion: Promotion) -> None:
        """Nobody wants the rest any more: after this nothing is written into its blocks."""
