"""One rank's part of a model on the CPU, run step by step; and what a rank of any device needs to know before it loads.

Knows no leader and no other process. Shapes: T rows of a step, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.machine.limits import available_bytes
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint, checkpoint_folder, with_stored_head
from workers.model.cpu.runner import TorchRunner, find_library, kernel_name, weights_dtype
from workers.model.cpu.self_test import require_invariance
from workers.model.decoder.ernie import Ernie, RankPart, mixture_index
from workers.model.decoder.kv_tensors import KvPool, choose_layout, kv_layout
from workers.model.decoder.layers import compute_dtype
from workers.model.decoder.model_runner import describe_model, require_bytes, served_len
from workers.model.native.rank import NativeRank
from workers.model.parallel.collectives import Links
from workers.model.parallel.direct_dispatch import DirectBuffers
from workers.model.parallel.expert_placement import Placement, initial
from workers.model.parallel.layout import Layout, Share
from workers.model.parallel.rank_experts import RankExperts
from workers.runner import Batch, LayerHook, Sampled
from workers.status import ModelInfo


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What all ranks of a group compute together in a step: tokens of prompts and of decode, and whether in two halves."""

    num_prefill: int
    num_decode: int
    halves: bool = False


class Rank(Protocol):
    """One rank's part of a model on some device. All ranks of a group call the same methods in the same order."""

    layout: Layout
    experts: RankExperts
    kernels: str
    """What it computes with, as the fingerprint names it: all ranks of a group the same."""
    device: str
    """What its process groups serve: cpu or cuda:N."""
    is_staged: bool
    """Keys and values are on a device, and come to the memory in use only when they are shown."""
    offers_direct: bool
    """The next epoch may bring rows to experts without the host, if all ranks offer it."""
    is_direct: bool
    """This epoch does: a rank that is lost then leaves this device waiting, and nothing but the end of the process ends that."""
    warnings: tuple[str, ...]

    @property
    def vocab_size(self) -> int: ...

    @property
    def kv_memory(self) -> KvMemory: ...

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def use_memory(self, memory: KvMemory, first_block: int = 0) -> None:
        """Keys and values are seen in `memory` from now on; what was computed before is forgotten.

        A memory with all heads is the whole group's, on this host: this rank takes its own heads of it. One with as many
        heads as this rank has is its own. `first_block` is the memory's first block less the first id in batches.
        """

    def resize(self, num_blocks: int) -> None:
        """The rank's pool has this many blocks from now on; `use_memory` comes next."""

    def show_blocks(self, blocks: Sequence[int]) -> None:
        """Copies blocks, by this rank's own ids, to the memory in use; nothing to do where they are computed there."""

    def take_blocks(self, blocks: Sequence[int]) -> None:
        """The inverse: blocks of the memory in use are those to compute with."""

    def prepare(self, direct: bool, store: Any) -> DirectBuffers | None:
        """Part of meeting the other ranks of an epoch, which all do together. `direct`: all have offered it.

        It may end after the epoch does, so it changes nothing that a step looks at: `use_buffers` takes its result.
        """

    def use_buffers(self, buffers: DirectBuffers | None) -> None:
        """This rank is in the epoch that `prepare` made them for, and brings rows to experts by them; None: by the host."""

    def left(self) -> None:
        """The epoch is over. Raises DeviceStuck when this process cannot join another one."""

    def execute_part(self, batch: Batch, step: GroupStep) -> list[Sampled]:
        """This rank's part of a step; with an empty batch it computes for the others alone."""


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


def describe_part(
    config: WorkerConfig,
    checkpoint: Checkpoint,
    dimensions: ErnieConfig,
    num_blocks: int,
    max_model_len: int,
    *facts: object,
) -> ModelInfo:
    """What a group says of its model: as one rank alone would. The KV is a whole pool's, not of a rank's heads: groups of
    other shapes hold the same values."""
    whole = kv_layout(dimensions, getattr(torch, config.dtype), num_blocks)
    return describe_model(config, checkpoint, whole, dimensions.vocab_size, max_model_len, *facts)


def own_layout(config: WorkerConfig, dimensions: ErnieConfig, layout: Layout, num_blocks: int) -> KvLayout:
    """A pool with a rank's heads alone."""
    mine = replace(dimensions, num_kv_heads=layout.share(dimensions.num_kv_heads).count)
    return kv_layout(mine, getattr(torch, config.dtype), num_blocks)


def group_layout(config: WorkerConfig, dimensions: ErnieConfig, layout: Layout, num_blocks: int) -> KvLayout:
    """The memory of all pools of `num_blocks` each, with all heads: what one rank that serves alone has."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return kv_layout(dimensions, dtype, num_blocks * layout.num_pools)


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


def initial_placement(config: WorkerConfig, dimensions: ErnieConfig) -> Placement:
    """Where experts are when a group starts."""
    moe = dimensions.moe
    if moe is None:
        return Placement(config.parallel.size, ())
    num_layers = mixture_index(moe, dimensions.num_layers)
    return initial(num_layers, moe.num_experts, config.parallel.size, config.parallel.redundant_experts)


def share_bytes(
    config: ErnieConfig,
    layout: Layout,
    placement: Placement,
    dtype: torch.dtype,
    *,
    copies_tied_head: bool = True,
    packed_dtype: torch.dtype | None = None,
) -> int:
    """Memory that a rank's weights take. `copies_tied_head`, `packed_dtype`: as in workers.model.decoder.model_runner.require_memory."""
    D, t = config.hidden_size, layout.tensor
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * D // t
    table = config.vocab_size * D // t
    values = (table if copies_tied_head or not config.tie_word_embeddings else 0) + D
    fp32_values = 0
    for index in range(config.num_layers):
        values += heads + 2 * D
        moe = config.moe
        if moe is None or not moe.has_layer(index):
            values += 3 * config.intermediate_size * D // t
            continue
        held = placement.slots_per_rank if layout.size > 1 else moe.num_experts
        values += 3 * moe.intermediate_size * D * (held + moe.num_shared_experts)
        fp32_values += (D + 1) * moe.num_experts
    return table * dtype.itemsize + values * (packed_dtype or dtype).itemsize + 4 * fp32_values


def split(batch: Batch) -> tuple[Batch, Batch]:
    """Two batches of about equal tokens, prompts and decode tokens in order: the rows of both are those of the whole."""
    slices = (*batch.prefill, *batch.decode)
    half, taken, count = batch.num_tokens / 2, 0, 0
    for piece in slices:
        if taken + len(piece.token_ids) / 2 > half:
            break
        taken += len(piece.token_ids)
        count += 1
    num_prefill = len(batch.prefill)
    first = Batch(batch.prefill[:count], batch.decode[: max(0, count - num_prefill)])
    second = Batch(batch.prefill[count:], batch.decode[max(0, count - num_prefill) :])
    return first, second
