"""The question every routing policy answers: which worker decodes a request, and who may compute its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from router.fleet.prefix_index import Prefixes
from router.fleet.worker_table import Flags, WorkerTable

_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs. Counts in tokens. `key` is equal for requests that begin alike: it breaks ties.

    `avoid` is the row of a worker that has just failed this request; -1: there is none. `ttft_s` is left until the first token
    is due and `tpot_s` may pass between two tokens, 0: whatever it takes. `session` names requests that belong together; 0: none.
    """

    key: int
    num_prompt_tokens: int
    num_output_tokens: int
    block_size: int
    avoid: int = -1
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    session: int = 0

    @property
    def tie_key(self) -> int:
        """Requests with the same prefer the same among workers that are alike."""
        return self.session or self.key

    @property
    def num_blocks(self) -> int:
        """KV blocks that the request will hold."""
        return -(-(self.num_prompt_tokens + self.num_output_tokens) // self.block_size)

    @property
    def num_prompt_blocks(self) -> int:
        """Those that a worker reserves before it begins."""
        return -(-self.num_prompt_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The workers that have room for a request now, as rows of the table, and what they cache of its prompt.

    Of `decodes` each has another one of `prefills`, or is itself one of `computes`: who may compute the prompt of what it decodes.
    `short` may do so as well, because little of the prompt is left to compute there, but need not. The times are what a handoff
    adds to a first token, by itself and for each block; `lower_tier_tokens` is what a block in a lower tier costs.
    """

    table: WorkerTable
    decodes: Flags
    prefills: Flags
    computes: Flags
    short: Flags
    prefixes: Prefixes
    handoff_s: float = 0.0
    handoff_block_s: float = 0.0
    lower_tier_tokens: int = 0


class Reason(StrEnum):
    """Why a route was taken; each has a counter."""

    ONLY_CANDIDATE = "only_candidate"
    CACHED_PREFIX = "cached_prefix"
    """It costs least, and whoever computes the prompt has most of it cached."""
    LEAST_COST = "least_cost"
    IN_TURN = "in_turn"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes, as rows. `prefill` is in order of preference; empty: the decode worker computes the prompt.

    `ttft_s` and `tpot_s` are what that is expected to take; 0: the policy does not ask.
    """

    decode: int
    prefill: tuple[int, ...] = ()
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    reason: Reason = Reason.IN_TURN


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a cost, in the unit of the scorer of that name: seconds, but for those that count."""

    name: str
    cost: float


@dataclass(frozen=True, slots=True)
class Weighed:
    """A candidate and what it costs. `is_kept` False: a filter has left it out."""

    row: int
    is_kept: bool
    num_cached_blocks: int
    parts: tuple[Part, ...] = ()

    @property
    def cost(self) -> float:
        return sum(part.cost for part in self.parts)


class Policy(Protocol):
    """Chooses a route; None when no candidate can decode."""

    def route(self, demand: Demand, candidates: Candidates) -> Route | None: ...

    def weigh(self, demand: Demand, candidates: Candidates) -> tuple[tuple[Weighed, ...], tuple[Weighed, ...]]:
        """What each candidate costs, those that would decode and those that would compute the prompt; changes nothing."""
        ...


def tie_break(key: int, seeds: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A fixed random order of workers for each key, so that equal requests agree and different ones spread."""
    mixed = (seeds ^ np.uint64(key)) * _MIX
    mixed ^= mixed >> _SHIFT
    mixed *= _MIX
    return mixed ^ (mixed >> _SHIFT)
