"""One rank's part of a model, whatever computes it: what its group asks of it, its share of memory, a batch in two halves.

Knows no leader, no device and no other process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from workers.config import WorkerConfig
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.decoder.ernie import mixture_index
from workers.model.decoder.kv_tensors import kv_layout
from workers.model.decoder.model_runner import describe_model
from workers.model.parallel.direct_dispatch import DirectBuffers
from workers.model.parallel.expert_placement import Placement, initial
from workers.model.parallel.layout import Layout
from workers.model.parallel.rank_experts import RankExperts
from workers.runner import Batch, Sampled
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
