"""A rank's pool on its device, seen in a host memory that may have more heads and more blocks: its group's, or its own.

Shapes: N blocks, L layers, K key-value heads of the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workers.kv_memory.memory import KvMemory
from workers.model.cuda.device_pool import DevicePool

_STAGED_BYTES = 32 << 20
"""What one copy between host and device moves at most; the size of the pinned memory between them."""


class StagedPart:
    """Copies run on the caller's thread, behind what the device was given before, and have ended on return."""

    def __init__(self, pool: DevicePool, memory: KvMemory, first_head: int, first_block: int) -> None:
        """The rank's heads are the memory's from `first_head` on, its block b is the memory's block b + `first_block`."""
        own, whole = pool.layout, memory.layout
        self._device = pool.values.device
        shape = (own.num_layers * 2, own.num_kv_heads, -1)
        self._blocks = pool.values.view(own.num_blocks + 1, *shape).view(torch.uint8)
        host = torch.from_numpy(memory.bytes).view(whole.num_blocks, whole.num_layers * 2, whole.num_kv_heads, -1)
        self._host = host.narrow(2, first_head, own.num_kv_heads)
        self._first_block = first_block
        self._group = max(1, _STAGED_BYTES // own.block_bytes)
        self._staged: Tensor | None = None

    def show(self, blocks: Sequence[int]) -> None:
        """From the device to the memory, by the rank's own block ids."""
        with torch.inference_mode():
            for index, staged in self._pieces(blocks):
                staged.copy_(self._blocks.index_select(0, index.to(self._device)), non_blocking=True)
                self._wait()
                self._host.index_copy_(0, index + self._first_block, staged)

    def take(self, blocks: Sequence[int]) -> None:
        """From the memory to the device."""
        with torch.inference_mode():
            for index, staged in self._pieces(blocks):
                staged.copy_(self._host.index_select(0, index + self._first_block))
                arrived = staged.to(self._device, non_blocking=True)
                self._blocks.index_copy_(0, index.to(self._device), arrived)
                self._wait()

    def _pieces(self, blocks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Block ids, and pinned memory for as many blocks."""
        if self._staged is None:
            shape = (self._group, *self._blocks.shape[1:])
            self._staged = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for first in range(0, len(blocks), self._group):
            index = torch.tensor(blocks[first : first + self._group])
            yield index, self._staged[: len(index)]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
