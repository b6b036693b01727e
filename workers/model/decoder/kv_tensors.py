"""The KV pool as a tensor, and how many blocks fit; knows neither sequences nor who owns a block.

Shapes: N blocks, L layers, K key-value heads, B positions of a block (64), C channels of a head, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.machine.limits import available_bytes
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.parallel.layout import Share
from workers.runner import BLOCK_SIZE

_MAX_FULL_SEQUENCES = 64
"""The automatic pool holds at most this many sequences of full length."""


class KvPool:
    """Reads and writes the bytes of a KvMemory as a tensor [N, L, 2 (K, V), K, B, C].

    It keeps one promise: what follows the last token in a block is zero. A probability of zero times such a value is
    zero, where stale bytes could be infinite and spread to other rows.
    """

    def __init__(self, memory: KvMemory, heads: Share | None = None, first_block: int = 0) -> None:
        """`heads`: the pool is that part of the memory's heads, and touches no other. `first_block`: block ids here are
        ids of the memory less this many, so that a rank's pool may be a part of a memory, or stand for one elsewhere."""
        whole = memory.layout
        heads = heads or Share(0, whole.num_kv_heads, whole.num_kv_heads)
        self.layout = replace(whole, num_kv_heads=heads.count)
        self._first_block = first_block
        self._total = whole.num_kv_heads
        first = torch.arange(heads.first, heads.first + heads.count)
        self._heads = torch.cat((first, first + self._total))  # of K, then of V
        self._some_heads = None if heads.is_whole else first
        values = torch.from_numpy(memory.bytes).view(getattr(torch, whole.dtype))
        self._positions = values.view(-1, whole.head_dim)
        self._by_head = values.view(whole.num_blocks * whole.num_layers * 2 * self._total, -1)
        self._halves = values.view(whole.num_blocks * whole.num_layers * 2, -1)
        self._blocks = values.view(whole.num_blocks, whole.num_layers * 2, self._total, -1).narrow(
            2, heads.first, heads.count
        )

    @property
    def address(self) -> int:
        """Where the first of this pool's heads lies in block 0, in this process."""
        return self._blocks.data_ptr() + self._first_block * self._blocks.stride(0) * self._blocks.element_size()

    @property
    def num_blocks(self) -> int:
        """Blocks of the memory from block 0 on."""
        return self.layout.num_blocks - self._first_block

    @property
    def memory_heads(self) -> int:
        """Heads that lie in a block, of which this pool's are some."""
        return self._total

    def slots(self, blocks_T: Tensor, offsets_T: Tensor) -> Tensor:
        """Where layer 0 keeps the K and V of each token, [T, 2*K]: an argument of `write`."""
        per_block = self.layout.num_layers * 2 * self._total
        places = ((blocks_T + self._first_block) * per_block)[:, None] + self._heads
        return places * self.layout.block_size + offsets_T[:, None]

    def write(self, layer: int, slots: Tensor, kv_T2KC: Tensor) -> None:
        """Stores keys and values of T tokens, heads flattened: [T, 2*K, C], rounded to the pool's dtype."""
        first = layer * 2 * self._total * self.layout.block_size
        rows = kv_T2KC.flatten(0, 1).to(self._positions.dtype)
        self._positions.index_copy_(0, (slots + first).flatten(), rows)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and the values of some blocks, each fp32 [len(blocks), K, B, C]."""
        shape = (-1, self.layout.num_kv_heads, self.layout.block_size, self.layout.head_dim)
        halves = ((blocks + self._first_block) * self.layout.num_layers + layer) * 2
        if self._some_heads is None:
            keys, values = self._halves.index_select(0, halves), self._halves.index_select(0, halves + 1)
        else:
            rows = (halves[:, None] * self._total + self._some_heads).flatten()
            keys, values = self._by_head.index_select(0, rows), self._by_head.index_select(0, rows + self._total)
        return keys.float().view(shape), values.float().view(shape)

    def clear(self, blocks: Tensor) -> None:
        """Zeroes blocks in all layers: of the heads that are this pool's."""
        self._blocks.index_fill_(0, blocks + self._first_block, 0)


def allocate(config: WorkerConfig, model: ErnieConfig, dtype: torch.dtype, max_model_len: int) -> KvMemory:
    """The pool that WorkerConfig asks for. Raises InvalidConfig when one sequence of full length does not fit."""
    return KvMemory(choose_layout(config, model, dtype, max_model_len, available_bytes()))


def choose_layout(
    config: WorkerConfig, model: ErnieConfig, dtype: torch.dtype, max_model_len: int, free_bytes: int
) -> KvLayout:
    """As many blocks as WorkerConfig asks for, given the free memory of the device that will hold them."""
    layout = kv_layout(model, dtype, num_blocks=1)
    blocks_per_sequence = -(-max_model_len // BLOCK_SIZE)
    sequence_bytes = blocks_per_sequence * layout.block_bytes
    if config.kv_memory_bytes:
        pool_bytes, source = config.kv_memory_bytes, "worker.kv_memory_bytes"
    else:
        pool_bytes = min(int(config.kv_memory_fraction * free_bytes), _MAX_FULL_SEQUENCES * sequence_bytes)
        source = f"worker.kv_memory_fraction ({config.kv_memory_fraction}) of {free_bytes / 2**20:.0f} MiB free"
    if pool_bytes > free_bytes:
        raise InvalidConfig(
            f"{source} asks for {pool_bytes / 2**20:.0f} MiB of KV, but {free_bytes / 2**20:.0f} MiB are free"
        )
    num_blocks = pool_bytes // layout.block_bytes
    if num_blocks < blocks_per_sequence:
        raise InvalidConfig(
            f"{source} gives {pool_bytes / 2**20:.1f} MiB of KV, but one sequence of {max_model_len} tokens needs "
            f"{sequence_bytes / 2**20:.1f} MiB; raise it or lower worker.max_model_len"
        )
    return kv_layout(model, dtype, num_blocks)


def kv_layout(model: ErnieConfig, dtype: torch.dtype, num_blocks: int) -> KvLayout:
    return KvLayout(
        num_blocks,
        model.num_layers,
        model.num_kv_heads,
        BLOCK_SIZE,
        model.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
    )
