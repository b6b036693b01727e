"""The KV pool in device memory, and its mirror in host memory that transfers read from and write to.

Shapes: N blocks, L layers, K key-value heads, B positions of a block (64), C channels of a head.

Shapes: N blocks, L layers, K key-value heads of the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.kv_memory.memory import KvLayout, KvMemory
from workers.model.cuda.copy_engine import CopyEngine, copy_engine
from workers.model.cuda.layer_copies import LayerCopies, StepCopies
from workers.runner import LayerHook

_STAGED_BYTES = 32 << 20
"""What one copy between host and device moves at most; the size of the pinned memory between them."""

OnFilled = Callable[[int], None]
"""Hears that the kernels which write the keys and values of a step's first n layers have been launched."""


class DevicePool:
    """Keys and values [N + 1, L, 2 (K, V), K, B, C] on the device; the last block is scratch, for rows nobody reads."""

    def __init__(self, layout: KvLayout, device: torch.device) -> None:
        self.layout = layout
        shape = (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        self.values = torch.zeros(layout.num_blocks + 1, *shape, dtype=dtype, device=device)

    @property
    def scratch_block(self) -> int:
        return self.layout.num_blocks

    def layer(self, index: int) -> Tensor:
        """View [N + 1, 2, K, B, C] of one layer."""
        return self.values[:, index]


class StagedKvMemory(KvMemory):
    """Host memory with a place for each block of a DevicePool; a block takes real memory once it was transferred.

    Copies run on the caller's thread, behind what the device was given before, and have ended on return; but for those of a
    step that is followed (`follow`), which run beside it on a thread of their own.
    """

    def __init__(self, pool: DevicePool, engine: CopyEngine | None = None) -> None:
        super().__init__(pool.layout)
        self._device = pool.values.device
        self._blocks = pool.values.view(pool.layout.num_blocks + 1, -1).view(torch.uint8)
        self._host = torch.from_numpy(self.bytes).view(pool.layout.num_blocks, -1)
        self._group = max(1, _STAGED_BYTES // pool.layout.block_bytes)
        self._staged: Tensor | None = None
        layers = (-1, pool.layout.num_layers, pool.layout.layer_bytes)
        self._layers = LayerCopies(
            self._blocks.view(layers), self.bytes.reshape(layers), engine or copy_engine(self._device)
        )
        self._shown: set[int] = set()
        """Blocks that the mirror has as the last finished step left them, and that nobody has asked for yet."""
        if self._device.type == "cuda":
            self.device_address = self._blocks.data_ptr()
            self.device_index = self._device.index or 0

    @property
    def copies(self) -> bool:
        return True

    @property
    def device_bytes(self) -> Tensor:
        """The pool on the device, uint8 [num_blocks * block_bytes]; byte i mirrors byte i of `bytes`."""
        return self._blocks[:-1].reshape(-1)

    def follow(self, hook: LayerHook | None) -> StepCopies | None:
        """Called before a step is launched, which may change any block. With a hook, its blocks are copied as they fill."""
        self._shown.clear()
        return None if hook is None or not hook.blocks else self._layers.follow(hook)

    def followed(self, copies: StepCopies) -> None:
        """The step has ended well. Waits for what is still being copied."""
        self._shown = set(copies.finish())

    def expose(self, blocks: Sequence[int]) -> None:
        """Copies blocks from the device to the host, where `block` shows them to a transfer; not those that a step has
        brought there."""
        shown = self._shown.intersection(blocks)
        self._shown -= shown
        blocks = [block for block in blocks if block not in shown]
        with torch.inference_mode():
            for first in range(0, len(blocks), self._group):
                index = torch.tensor(blocks[first : first + self._group])
                staged = self._staging()[: len(index)]
                staged.copy_(self._blocks.index_select(0, index.to(self._device)), non_blocking=True)
                self._wait()
                self._host.index_copy_(0, index, staged)

    def adopt(self, blocks: Sequence[int]) -> None:
        """Copies blocks that a transfer has placed from the host to the device."""
        self._shown.difference_update(blocks)
        with torch.inference_mode():
            for first in range(0, len(blocks), self._group):
                index = torch.tensor(blocks[first : first + self._group])
                staged = self._staging()[: len(index)]
                torch.index_select(self._host, 0, index, out=staged)
                arrived = staged.to(self._device, non_blocking=True)
                self._blocks.index_copy_(0, index.to(self._device), arrived)
                self._wait()

    def copy_out(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        """As KvMemory.copy_out, through the pinned memory and past the mirror, which stays as small as it is."""
        with torch.inference_mode():
            for first in range(0, len(blocks), self._group):
                index = torch.tensor(blocks[first : first + self._group])
                staged = self._staging()[: len(index)]
                staged.copy_(self._blocks.index_select(0, index.to(self._device)), non_blocking=True)
                self._wait()
                for row, view in zip(staged.numpy(), views[first : first + self._group], strict=True):
                    view[:] = row

    def copy_in(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        """As KvMemory.copy_in, through the pinned memory and past the mirror."""
        self._shown.difference_update(blocks)
        with torch.inference_mode():
            for first in range(0, len(blocks), self._group):
                index = torch.tensor(blocks[first : first + self._group])
                staged = self._staging()[: len(index)]
                for row, view in zip(staged.numpy(), views[first : first + self._group], strict=True):
                    row[:] = view
                arrived = staged.to(self._device, non_blocking=True)
                self._blocks.index_copy_(0, index.to(self._device), arrived)
                self._wait()

    def close(self) -> None:
        self._layers.close()
        super().close()

    def _staging(self) -> Tensor:
        if self._staged is None:
            shape = (self._group, self.layout.block_bytes)
            self._staged = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return self._staged

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


_PART_BYTES = 32 << 20
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
        self._group = max(1, _PART_BYTES // own.block_bytes)
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
