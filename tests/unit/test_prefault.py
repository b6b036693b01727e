"""A pool gets its memory before the bytes come: once for each block, and without touching what a block holds."""

from __future__ import annotations

import mmap
import platform
import sys

import pytest

from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_memory.prefault import Prefault

LAYOUT = KvLayout(16, 2, 1, 64, 64, "float32", 4)
"""Blocks of 64 KiB: sixteen pages each."""


def resident_kib(memory: KvMemory, block: int) -> int:
    """How much of a block this process has in its page table, from /proc/self/pagemap."""
    page = mmap.PAGESIZE
    start = memory.bytes.ctypes.data + block * LAYOUT.block_bytes
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(start // page * 8)
        entries = table.read(LAYOUT.block_bytes // page * 8)
    return sum(entries[at + 7] >> 7 for at in range(0, len(entries), 8)) * page // 1024


@pytest.mark.skipif(
    sys.platform != "linux" or tuple(map(int, platform.release().split(".")[:2])) < (5, 14),
    reason="the kernel has no MADV_POPULATE_WRITE",
)
def test_blocks_have_their_memory_before_anything_is_written() -> None:
    memory = KvMemory(LAYOUT)
    prefault = Prefault(memory)

    prefault.back(prefault.fresh([5, 3, 4, 9]))

    whole = LAYOUT.block_bytes // 1024
    assert [resident_kib(memory, block) for block in (3, 4, 5, 9)] == [whole] * 4
    assert resident_kib(memory, 7) == 0
    assert not memory.bytes.any()


def test_a_block_is_asked_for_once() -> None:
    prefault = Prefault(KvMemory(LAYOUT))
    assert prefault.fresh([7, 2, 3]) == [2, 3, 7]
    assert prefault.fresh([3, 4, 2]) == [4]
    assert prefault.fresh([]) == []


def test_what_a_block_holds_stays() -> None:
    memory = KvMemory(LAYOUT)
    memory.bytes[:] = 9
    prefault = Prefault(memory)
    prefault.back(prefault.fresh(range(LAYOUT.num_blocks)))
    assert (memory.bytes == 9).all()
