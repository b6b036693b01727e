"""The question every routing policy answers: which worker decodes a request, and who may compute its prompt."""

from __future__ import annotations

from dataclasses import dataclass
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

    `avoid` is the row of a worker that has just failed this request; -1: there is none.
    """

    key: int
    num_prompt_tokens: int
    num_output_tokens: int
    block_size: int
    avoid: int = -1

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
    """

    table: WorkerTable
    decodes: Flags
    prefills: Flags
    computes: Flags
    prefixes: Prefixes


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes, as rows. `prefill` is in order of preference; empty: the decode worker computes the prompt."""

    decode: int
    prefill: tuple[int, ...] = ()


class Policy(Protocol):
    """Chooses a route; None when no candidate can decode."""

    def route(self, demand: Demand, candidates: Candidates) -> Route | None: ...


def tie_break(key: int, seeds: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A fixed random order of workers for each key, so that equal requests agree and different ones spread."""
    mixed = (seeds ^ np.uint64(key)) * _MIX
    mixed ^= mixed >> _SHIFT
    mixed *= _MIX
    return mixed ^ (mixed >> _SHIFT)
