"""KV that moves between groups of other shapes arrives head by head where the target group expects it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import InvalidConfig
from workers.kv_transfer.memory import KvLayout
from workers.kv_transfer.resharding import PoolCut, by_target, copy_heads, pack, plan, unpack, view

LAYERS, BLOCK, DIM, BLOCKS = 2, 4, 2, 5


def layout(num_heads: int) -> KvLayout:
    return KvLayout(BLOCKS, LAYERS, num_heads, BLOCK, DIM, "float32", 4)


def empty_pools(cut: PoolCut) -> list[npt.NDArray[np.uint8]]:
    size = layout(cut.heads_per_rank).pool_bytes
    return [np.zeros(size, dtype=np.uint8) for _ in range(cut.num_pools * cut.tensor)]


def fill(cut: PoolCut, pool: int, block: int, full: npt.NDArray[np.uint8], pools: list[npt.NDArray[np.uint8]]) -> None:
    """Puts a block [layers, 2, all heads, bytes] where a group of this cut keeps it."""
    for part in range(cut.tensor):
        heads = slice(part * cut.heads_per_rank, (part + 1) * cut.heads_per_rank)
        view(pools[cut.rank(pool, part)], layout(cut.heads_per_rank))[block] = full[:, :, heads]


def gathered(cut: PoolCut, pool: int, block: int, pools: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """The same block with all heads, from the ranks that hold it."""
    parts = [view(pools[cut.rank(pool, part)], layout(cut.heads_per_rank))[block] for part in range(cut.tensor)]
    return np.concatenate(parts, axis=2)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[PoolCut, PoolCut]:
    num_heads = draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    divisors = [count for count in range(1, num_heads + 1) if num_heads % count == 0]

    def cut() -> PoolCut:
        return PoolCut(num_heads, draw(st.integers(1, 4)), draw(st.sampled_from(divisors)))

    return cut(), cut()


@settings(max_examples=60, deadline=None)
@given(cuts(), st.data())
def test_any_two_layouts_exchange_blocks_as_a_pool_with_all_heads_would(
    pair: tuple[PoolCut, PoolCut], data: st.DataObject
) -> None:
    source, target = pair
    from_pool = data.draw(st.integers(0, source.num_pools - 1))
    to_pool = data.draw(st.integers(0, target.num_pools - 1))
    from_blocks = data.draw(st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=3, unique=True))
    to_blocks = data.draw(st.permutations(range(BLOCKS)))[: len(from_blocks)]
    reference = np.random.default_rng(0).integers(
        0, 256, (BLOCKS, LAYERS, 2, source.num_heads, BLOCK * DIM * 4), dtype=np.uint8
    )
    sources, targets = empty_pools(source), empty_pools(target)
    for block in range(BLOCKS):
        fill(source, from_pool, block, reference[block], sources)
    copies = plan(source, from_pool, target, to_pool)
    pairs = list(zip(from_blocks, to_blocks, strict=True))
    by_message = empty_pools(target)
    for copy in copies:
        shapes = layout(source.heads_per_rank), layout(target.heads_per_rank)
        copy_heads(copy, sources[copy.source_rank], shapes[0], targets[copy.target_rank], shapes[1], pairs)
        for from_block, to_block in pairs:
            for layer in range(LAYERS):
                heads = (copy.source_head, copy.num_heads)
                packed = pack(sources[copy.source_rank], shapes[0], from_block, layer, 1, heads)
                to_heads = (copy.target_head, copy.num_heads)
                unpack(packed, by_message[copy.target_rank], shapes[1], to_block, layer, 1, to_heads)
    for from_block, to_block in pairs:
        assert np.array_equal(gathered(target, to_pool, to_block, targets), reference[from_block])
    assert all(np.array_equal(a, b) for a, b in zip(targets, by_message, strict=True))
    untouched = set(range(BLOCKS)) - set(to_blocks)
    assert not any(gathered(target, to_pool, block, targets).any() for block in untouched)


@settings(deadline=None)
@given(cuts())
def test_every_head_is_sent_once_and_each_target_rank_fetches_its_own(pair: tuple[PoolCut, PoolCut]) -> None:
    source, target = pair
    copies = plan(source, 0, target, target.num_pools - 1)
    assert sum(copy.num_heads for copy in copies) == source.num_heads
    for part in range(target.tensor):
        rank = target.rank(target.num_pools - 1, part)
        heads = [copy.target_head + i for copy in by_target(copies, rank) for i in range(copy.num_heads)]
        assert heads == list(range(target.heads_per_rank))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="2 key-value heads cannot be cut among 4 ranks"):
        PoolCut(2, 1, 4)
    with pytest.raises(InvalidConfig, match="cannot give KV"):
        plan(PoolCut(2, 1, 1), 0, PoolCut(4, 1, 1), 0)
    with pytest.raises(InvalidConfig, match="does not exist"):
        plan(PoolCut(2, 1, 1), 1, PoolCut(2, 1, 1), 0)
    pool = np.zeros(layout(2).pool_bytes, dtype=np.uint8)
    with pytest.raises(ValueError, match="are not 1 heads"):
        unpack(np.ones(3, dtype=np.uint8), pool, layout(2), 0, 0, 1, (0, 1))
    assert not pool.any()
