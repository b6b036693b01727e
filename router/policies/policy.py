"""The question every routing policy answers: which worker decodes a request, and who may compute its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs. Counts in tokens. `key` is equal for requests that begin alike: it breaks ties."""

    key: str
    num_prompt_tokens: int
    num_output_tokens: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        """KV blocks that the request will hold."""
        return -(-(self.num_prompt_tokens + self.num_output_tokens) // self.block_size)


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """A worker that takes requests now: its last reported load plus what was sent to it since.

    `cached_blocks` is how much of this request's prompt it caches; `lower_blocks` of them are in host memory or on disk, from
    where they take longer, and take up free blocks. `avoid`: it has just failed this request.
    """

    worker_id: str
    can_decode: bool
    can_prefill: bool
    num_sequences: int = 0
    prefill_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    lower_blocks: int = 0
    avoid: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. `prefill` is in order of preference; empty: the decode worker computes the prompt."""

    decode: str
    prefill: tuple[str, ...] = ()


class Policy(Protocol):
    """Chooses a route; None when no worker can decode. Workers come in a stable order."""

    def route(self, demand: Demand, workers: Sequence[WorkerSnapshot]) -> Route | None: ...


def tie_break(key: str, worker_id: str) -> int:
    """A fixed random order of workers for each key, so that equal requests agree and different ones spread."""
    return xxhash.xxh3_64_intdigest(f"{key}/{worker_id}".encode())
