"""Decides which heads of a KV block go from which rank to which when two groups cut heads differently, and copies them between pool views.

Knows no transport. A group's KV is cut in two ways: sequences live in pools, and within a pool the tensor-parallel
ranks hold equal runs of heads. A sequence moves from one pool to one pool; its blocks are re-cut by head on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.errors import InvalidConfig
from workers.kv_transfer.memory import KvLayout

Bytes = npt.NDArray[np.uint8]
"""All bytes of one rank's pool, uint8 [num_blocks * block_bytes]."""


@dataclass(frozen=True, slots=True)
class PoolCut:
    """How a group holds KV: `num_pools` pools, each over `tensor` ranks with num_heads / tensor heads; rank = pool * tensor + part."""

    num_heads: int
    num_pools: int
    tensor: int

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_pools, self.tensor) < 1 or self.num_heads % self.tensor:
            raise InvalidConfig(f"{self.num_heads} key-value heads cannot be cut among {self.tensor} ranks")

    @property
    def heads_per_rank(self) -> int:
        return self.num_heads // self.tensor

    def rank(self, pool: int, part: int) -> int:
        return pool * self.tensor + part


@dataclass(frozen=True, slots=True)
class HeadCopy:
    """`num_heads` heads of a block, from `source_head` on in the source rank's pool, to `target_head` on in the target's.

    Both count from the rank's own first head.
    """

    source_rank: int
    source_head: int
    target_rank: int
    target_head: int
    num_heads: int


def plan(source: PoolCut, source_pool: int, target: PoolCut, target_pool: int) -> tuple[HeadCopy, ...]:
    """The copies that make up every block of a sequence, in order of head; each head is copied once to each place.

    Raises InvalidConfig when the groups serve different models.
    """
    if source.num_heads != target.num_heads:
        raise InvalidConfig(
            f"a model with {source.num_heads} key-value heads cannot give KV to one with {target.num_heads}"
        )
    if not (0 <= source_pool < source.num_pools and 0 <= target_pool < target.num_pools):
        raise InvalidConfig("a pool that does not exist cannot give or take KV")
    edges = sorted(
        {*range(0, source.num_heads, source.heads_per_rank), *range(0, target.num_heads, target.heads_per_rank)}
    )
    copies = []
    for first, end in zip(edges, [*edges[1:], source.num_heads], strict=True):
        source_part, source_head = divmod(first, source.heads_per_rank)
        target_part, target_head = divmod(first, target.heads_per_rank)
        copies.append(
            HeadCopy(
                source.rank(source_pool, source_part), source_head, target.rank(target_pool, target_part), target_head,
                end - first,
            )
        )  # fmt: skip
    return tuple(copies)


def view(pool: Bytes, layout: KvLayout) -> npt.NDArray[np.uint8]:
    """A rank's pool as bytes [num_blocks, num_layers, 2, its heads, bytes of a head], without a copy."""
    head_bytes = layout.block_size * layout.head_dim * layout.itemsize
    return pool.reshape(layout.num_blocks, layout.num_layers, 2, layout.num_kv_heads, head_bytes)


def head_bytes(layout: KvLayout, num_heads: int, num_layers: int) -> int:
    """Bytes of some heads of some layers of a block: what `pack` writes."""
    return num_layers * 2 * num_heads * layout.block_size * layout.head_dim * layout.itemsize


def copy_heads(
    copy: HeadCopy,
    source: Bytes,
    source_layout: KvLayout,
    target: Bytes,
    target_layout: KvLayout,
    blocks: Iterable[tuple[int, int]],
) -> None:
    """Copies the heads of whole blocks, given as (source block, target block), between pools that this process sees."""
    from_pool, to_pool = view(source, source_layout), view(target, target_layout)
    from_heads = slice(copy.source_head, copy.source_head + copy.num_heads)
    to_heads = slice(copy.target_head, copy.target_head + copy.num_heads)
    for source_block, target_block in blocks:
        np.copyto(to_pool[target_block, :, :, to_heads], from_pool[source_block, :, :, from_heads])


def pack(pool: Bytes, layout: KvLayout, block: int, first_layer: int, num_layers: int, heads: tuple[int, int]) -> Bytes:
    """Heads first .. first+count-1 of some layers of a block as one run of bytes, for a message or a checksum."""
    first, count = heads
    part = view(pool, layout)[block, first_layer : first_layer + num_layers, :, first : first + count]
    return np.ascontiguousarray(part).reshape(-1)


def unpack(
    data: Bytes, pool: Bytes, layout: KvLayout, block: int, first_layer: int, num_layers: int, heads: tuple[int, int]
) -> None:
    """The reverse of `pack`. Raises ValueError when `data` has another size, and changes nothing."""
    first, count = heads
    if data.size != head_bytes(layout, count, num_layers):
        raise ValueError(f"{data.size} bytes are not {count} heads of {num_layers} layers")
    part = view(pool, layout)[block, first_layer : first_layer + num_layers, :, first : first + count]
    np.copyto(part, data.reshape(part.shape))


def by_target(copies: Sequence[HeadCopy], rank: int) -> tuple[HeadCopy, ...]:
    """What one target rank has to fetch for each block."""
    return tuple(copy for copy in copies if copy.target_rank == rank)
