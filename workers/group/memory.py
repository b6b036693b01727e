"""The whole group's KV in one layout, whole heads and all pools, whatever the ranks' own; knows no model and no handoff.

CPU ranks on the leader's host write into this very memory. What a rank holds elsewhere, on another host or on a GPU, is
fetched before a transfer shows it (`expose`), and brought there once a transfer has placed it (`adopt`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from workers.errors import RankLost
from workers.group.messages import Blocks, GetBlocks, PutBlocks
from workers.kv_memory.memory import KvLayout, KvMemory

CHUNK_BYTES = 8 << 20
"""What one message carries at most, unless a single block is more."""


@dataclass(frozen=True, slots=True)
class RemotePart:
    """What a rank that computes elsewhere than in this memory holds: some heads of one pool's blocks."""

    rank: int
    pool: int
    first_head: int
    num_heads: int
    shares_memory: bool = False
    """It copies between its device and this memory itself; otherwise the bytes travel with the messages."""


class OwnPart(Protocol):
    """The leader's own rank, where it computes on a device; its blocks are the first pool's."""

    def show_blocks(self, blocks: Sequence[int]) -> None: ...

    def take_blocks(self, blocks: Sequence[int]) -> None: ...


class GroupKvMemory(KvMemory):
    """Blocks of all pools, pool p's from p * blocks_per_pool on. Whatever brings blocks here or away raises RankLost.

    `remote_parts()` tells which ranks have memories of their own now; `ask(rank, message, epoch)` returns a rank's answer.
    """

    def __init__(
        self,
        layout: KvLayout,
        blocks_per_pool: int,
        remote_parts: Callable[[], Sequence[RemotePart]],
        ask: Callable[[int, GetBlocks | PutBlocks, int | None], Blocks],
    ) -> None:
        super().__init__(layout)
        self._blocks_per_pool = blocks_per_pool
        self._remote_parts, self._ask = remote_parts, ask
        self.own: OwnPart | None = None
        self.epoch = 0
        """That of the last step: blocks are shown in the epoch that they were computed in, or not at all."""
        self.num_moved_bytes = 0
        """Between hosts, in both directions."""

    @property
    def copies(self) -> bool:
        return self.own is not None or bool(self._remote_parts())

    def expose(self, blocks: Sequence[int]) -> None:
        if self.own is not None:
            self.own.show_blocks(self._in_first_pool(blocks))
        for part, ids, local in self._shares(blocks):
            answer = self._ask(part.rank, GetBlocks(local), self.epoch)
            if part.shares_memory:
                continue
            put_heads(self, ids, part.first_head, part.num_heads, answer.tail)
            self.num_moved_bytes += len(answer.tail)

    def adopt(self, blocks: Sequence[int]) -> None:
        if self.own is not None:
            self.own.take_blocks(self._in_first_pool(blocks))
        for part, ids, local in self._shares(blocks):
            tail = b"" if part.shares_memory else take_heads(self, ids, part.first_head, part.num_heads)
            self._ask(part.rank, PutBlocks(local, tail=tail), None)
            self.num_moved_bytes += len(tail)

    def copy_out(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        self.expose(blocks)
        super().copy_out(blocks, views)

    def copy_in(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        super().copy_in(blocks, views)
        self.adopt(blocks)

    def _in_first_pool(self, blocks: Sequence[int]) -> list[int]:
        return [block for block in blocks if block < self._blocks_per_pool]

    def _shares(self, blocks: Sequence[int]) -> Iterator[tuple[RemotePart, list[int], list[int]]]:
        """For each remote rank its blocks among `blocks`, a message's worth at a time: ids here, and ids there."""
        for part in self._remote_parts():
            mine = [block for block in blocks if block // self._blocks_per_pool == part.pool]
            part_bytes = self.layout.block_bytes * part.num_heads // self.layout.num_kv_heads
            size = max(1, CHUNK_BYTES // part_bytes)
            for first in range(0, len(mine), size):
                ids = mine[first : first + size]
                yield part, ids, [block - part.pool * self._blocks_per_pool for block in ids]


def take_heads(memory: KvMemory, blocks: Sequence[int], first_head: int, num_heads: int) -> bytes:
    """The bytes of some heads of blocks: [blocks, layers, 2, heads, block size, head dim]."""
    return _by_head(memory)[list(blocks), :, first_head : first_head + num_heads].tobytes()


def put_heads(memory: KvMemory, blocks: Sequence[int], first_head: int, num_heads: int, data: bytes) -> None:
    """The inverse of `take_heads`. Raises RankLost when `data` has another size."""
    whole = _by_head(memory)
    shape = (len(blocks), whole.shape[1], num_heads, whole.shape[3])
    if len(data) != np.prod(shape):
        raise RankLost(f"a rank sent {len(data)} bytes for {len(blocks)} blocks")
    whole[list(blocks), :, first_head : first_head + num_heads] = np.frombuffer(data, np.uint8).reshape(shape)


def _by_head(memory: KvMemory) -> npt.NDArray[np.uint8]:
    """[blocks, layers * 2, heads, bytes of a head]."""
    layout = memory.layout
    return memory.bytes.reshape(layout.num_blocks, layout.num_layers * 2, layout.num_kv_heads, -1)
