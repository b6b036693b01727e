"""One rank's part of a model on the CPU, run step by step.

Knows no leader and no other process. Shapes: T rows of a step, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.machine.limits import available_bytes
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint, checkpoint_folder, with_stored_head
from workers.model.cpu.runner import TorchRunner, find_library, kernel_name, weights_dtype
from workers.model.cpu.self_test import require_invariance
from workers.model.decoder.ernie import Ernie, RankPart
from workers.model.decoder.kv_tensors import KvPool, choose_layout
from workers.model.decoder.layers import compute_dtype
from workers.model.decoder.model_runner import require_bytes, served_len
from workers.model.decoder.rank import GroupStep, describe_part, own_layout, share_bytes, split
from workers.model.native.rank import NativeRank
from workers.model.parallel.collectives import Links
from workers.model.parallel.direct_dispatch import DirectBuffers
from workers.model.parallel.expert_placement import Placement
from workers.model.parallel.layout import Layout, Share
from workers.model.parallel.rank_experts import RankExperts
from workers.runner import Batch, LayerHook, Sampled
from workers.status import ModelInfo


class RankRunner(TorchRunner):
    """Implements Rank on the CPU."""

    device = "cpu"
    is_staged = False
    offers_direct = False
    is_direct = False

    def __init__(
        self,
        model: Ernie | NativeRank,
        memory: KvMemory,
        info: ModelInfo,
        config: WorkerConfig,
        layout: Layout,
        placement: Placement,
        kernels: str,
    ) -> None:
        super().__init__(model, memory, info, config.num_threads)
        served_dtype: torch.dtype = getattr(torch, config.dtype)
        dtype = compute_dtype(served_dtype) if isinstance(model, Ernie) else served_dtype
        self._part = model
        self.layout = layout
        self.experts = RankExperts(
            model.mixtures, model.links, layout, placement, model.config, checkpoint_folder(config.model),
            num_nodes=config.parallel.num_nodes, dtype=dtype, device=torch.device("cpu"),
        )  # fmt: skip
        self.kernels = kernels
        self._halves = False

    @property
    def _own_heads(self) -> Share:
        return self.layout.share(self._part.config.num_kv_heads)

    def use_memory(self, memory: KvMemory, first_block: int = 0) -> None:
        """As Rank's; the rank computes in that memory itself."""
        mine = self._own_heads
        is_own = memory.layout.num_kv_heads == mine.count
        self._memory = memory
        self._pool = KvPool(memory, None if is_own else mine, first_block)

    def resize(self, num_blocks: int) -> None:
        pass  # the memory in use says it

    def show_blocks(self, blocks: Sequence[int]) -> None:
        pass

    def take_blocks(self, blocks: Sequence[int]) -> None:
        pass

    def prepare(self, direct: bool, store: Any) -> None:
        return None

    def use_buffers(self, buffers: DirectBuffers | None) -> None:
        pass

    def left(self) -> None:
        pass

    def execute_part(self, batch: Batch, step: GroupStep) -> list[Sampled]:
        self._halves = step.halves
        if batch.prefill or batch.decode:
            return self.execute(batch)
        with torch.inference_mode():
            self.hidden_states(batch)
        return []

    def hidden_states(self, batch: Batch, on_layer: LayerHook | None = None) -> Tensor:
        """As TorchRunner's, in two halves where asked for."""
        if not self._halves:
            return super().hidden_states(batch, on_layer)
        self._use_threads()
        first, second = split(batch)
        with torch.inference_mode():
            return self._part.compute_halves(first, second, self._pool)


def load_rank(config: WorkerConfig, rank: int, links: Links, placement: Placement, num_blocks: int = 0) -> RankRunner:
    """Loads one rank's share of config.model. `num_blocks` 0: as many KV blocks as the settings give.

    Raises InvalidConfig when the model cannot be cut so or does not fit.
    """
    folder = checkpoint_folder(config.model)
    dimensions, checkpoint = ErnieConfig.load(folder), Checkpoint(folder)
    dimensions = with_stored_head(dimensions, checkpoint)
    layout = Layout.of(config.parallel, dimensions, rank)
    max_model_len = served_len(config, dimensions)
    torch.set_num_threads(config.num_threads)
    dtype: torch.dtype = getattr(torch, config.dtype)
    library, warnings = find_library(config, dimensions, layout)
    kernels = kernel_name(library, dtype)
    held_dtype = weights_dtype(library, dtype)
    needed_bytes = share_bytes(
        dimensions, layout, placement, dtype, copies_tied_head=library is None, packed_dtype=held_dtype
    )
    require_bytes(folder, needed_bytes, held_dtype, available_bytes(), served_dtype=dtype)
    part = RankPart(layout, links, placement, config.parallel.exact_combine)
    model: Ernie | NativeRank
    with torch.inference_mode():
        if library is None:
            model = Ernie(dimensions, checkpoint, held_dtype, max_model_len, part)
            warnings = (*warnings, *require_invariance(model, dtype))
        else:
            model = NativeRank(dimensions, checkpoint, dtype, library, config.num_threads, part)
    memory = KvMemory(rank_layout(config, dimensions, layout, max_model_len, num_blocks))
    info = describe_part(config, checkpoint, dimensions, memory.layout.num_blocks, max_model_len, kernels)
    runner = RankRunner(model, memory, info, config, layout, placement, kernels)
    runner.warnings = warnings
    return runner


def rank_layout(
    config: WorkerConfig, dimensions: ErnieConfig, layout: Layout, max_model_len: int, num_blocks: int = 0
) -> KvLayout:
    """The pool of one rank on the CPU: all blocks of its sequences, with its own heads."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    if num_blocks:
        return own_layout(config, dimensions, layout, num_blocks)
    mine = replace(dimensions, num_kv_heads=layout.share(dimensions.num_kv_heads).count)
    neighbours = config.parallel.ranks_per_node or layout.size
    shared = replace(config, kv_memory_fraction=config.kv_memory_fraction / neighbours)
    return choose_layout(shared, mine, dtype, max_model_len, available_bytes())
