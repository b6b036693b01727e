"""How blocks are cut into pieces, and how a pool is mapped by another process."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import FrameType

import pytest
from builders import fake_layout
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout, KvMemory, MappedKvMemory, same_shape
from workers.kv_memory.pieces import Cut


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 5), st.integers(1, 9), st.sampled_from([1, 64, 128]))
def test_a_cut_covers_every_layer_of_every_block_once(
    num_layers: int, num_heads: int, first: int, num_blocks: int, head_dim: int
) -> None:
    layout = KvLayout(16, num_layers, num_heads, 64, head_dim, "bfloat16", 2)
    cut = Cut(layout, first, num_blocks)
    seen = [
        (slot.block, layer)
        for slot in map(cut.slot, range(cut.num_pieces))
        for layer in range(slot.first_layer, slot.first_layer + slot.num_layers)
    ]
    assert seen == [(b, layer) for b in range(first, first + num_blocks) for layer in range(num_layers)]
    assert cut.pieces_before(first + num_blocks) == cut.num_pieces and cut.pieces_before(first) == 0
    with pytest.raises(IndexError):
        cut.slot(cut.num_pieces)


def test_what_is_asked_of_every_piece_is_worked_out_once() -> None:
    """A prompt of 128K tokens has thousands of pieces, and both ends ask several times for each."""
    cut = Cut(KvLayout(4096, 28, 4, 64, 128, "bfloat16", 2), 0, 2048)
    called: list[str] = []

    def hook(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(hook)
    try:
        cut.slot(777)
        cut.piece_bytes(777)
    finally:
        sys.setprofile(None)
    assert called == ["slot", "piece_bytes"]


def test_a_pool_can_be_mapped_only_as_what_it_is() -> None:
    pool = KvMemory(fake_layout())
    pool.block(3, 0, 2)[:] = 42
    mapped = MappedKvMemory(pool.handle, pool.layout)
    assert (mapped.block(3, 0, 2) == 42).all()
    with pytest.raises(ValueError, match="read-only"):
        mapped.block(3, 0, 2)[:] = 1
    with pytest.raises(TransferFailed, match="nonce"):
        MappedKvMemory(replace(pool.handle, nonce=b"x" * 16), pool.layout)
    with pytest.raises(TransferFailed, match="layout says"):
        MappedKvMemory(pool.handle, fake_layout(17))
    with pytest.raises(TransferFailed, match="cannot be opened"):
        MappedKvMemory(replace(pool.handle, fd=9999), pool.layout)
    with pytest.raises(IndexError):
        pool.block(16, 0, 1)
    with pytest.raises(IndexError):
        pool.block(0, 1, 2)
    assert same_shape(pool.layout, fake_layout(99)) and not same_shape(pool.layout, fake_layout(16, 3))
    pool.close()
