"""One rank's part of a model on a CUDA device, step by step. Knows no leader and no other process.

Prompts and decode are passes of their own here as for one rank alone (workers.model.cuda.runner), and all ranks make the same
passes. Nothing is recorded as a graph: how many rows travel between two ranks is known in mid-layer only. Shapes: T rows
of a step, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.errors import DeviceStuck, InvalidConfig
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint, checkpoint_folder, with_stored_head
from workers.model.cuda.device_pool import DevicePool, StagedPart
from workers.model.cuda.ernie import CudaErnie
from workers.model.cuda.rank_ernie import RankErnie
from workers.model.cuda.runner import as_current, free_bytes
from workers.model.cuda.step_inputs import ROW_COLUMNS, StepInputs, Upload, fill_decode_rows
from workers.model.decoder.ernie import RankPart
from workers.model.decoder.kv_tensors import choose_layout
from workers.model.decoder.model_runner import ModelRunner, require_bytes, served_len
from workers.model.decoder.rank import GroupStep, describe_part, initial_placement, own_layout, share_bytes, split
from workers.model.parallel.collectives import Links, Stages, finish, finish_both
from workers.model.parallel.direct_dispatch import DirectBuffers, SymmetricMemory, is_available, nvshmem
from workers.model.parallel.expert_placement import Placement
from workers.model.parallel.layout import Layout
from workers.model.parallel.rank_experts import RankExperts
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled, SequenceSlice
from workers.status import ModelInfo

_STUCK_S = 10.0
"""A device that is still busy this long after its epoch was aborted waits for a rank that is gone."""


Symmetric = Callable[[Any, int, int, torch.device], SymmetricMemory]


class CudaRankRunner(ModelRunner[RankErnie]):
    """Implements workers.model.decoder.rank.Rank."""

    is_staged = True

    def __init__(
        self,
        model: RankErnie,
        pool: DevicePool,
        info: ModelInfo,
        config: WorkerConfig,
        layout: Layout,
        experts: RankExperts,
        device: torch.device,
        symmetric: Symmetric | None,
    ) -> None:
        """`symmetric(store, rank, size, device)` gives the memory by which this rank would bring rows to experts without
        the host, where all of a group would; None: it would not."""
        super().__init__(model, KvMemory(pool.layout), info)
        self._pool, self._config, self._torch_device = pool, config, device
        self.layout, self.experts = layout, experts
        self.kernels, self.device = device.type, str(device)
        self._symmetric = symmetric
        self.offers_direct = symmetric is not None and bool(model.mixtures)
        self._part = StagedPart(pool, self._memory, 0, 0)
        self._upload = Upload(device)
        self._step = GroupStep(0, 0)
        self._buffers: DirectBuffers | None = None
        self.is_direct = False

    # ---- memory ----

    def use_memory(self, memory: KvMemory, first_block: int = 0) -> None:
        """As Rank's; the rank computes on its device."""
        mine = self.layout.share(self._memory_heads)
        is_own = memory.layout.num_kv_heads == mine.count
        self._memory = memory
        self._part = StagedPart(self._pool, memory, 0 if is_own else mine.first, first_block)

    def resize(self, num_blocks: int) -> None:
        """As Rank's."""
        if num_blocks != self._pool.layout.num_blocks:
            layout = replace(self._pool.layout, num_blocks=num_blocks)
            del self._pool, self._part  # there may be no room for two
            self._pool = DevicePool(layout, self._torch_device)

    def show_blocks(self, blocks: Sequence[int]) -> None:
        with as_current(self._torch_device):
            self._part.show(blocks)

    def take_blocks(self, blocks: Sequence[int]) -> None:
        with as_current(self._torch_device):
            self._part.take(blocks)

    @property
    def _memory_heads(self) -> int:
        return self._pool.layout.num_kv_heads * self.layout.tensor

    # ---- epochs ----

    def prepare(self, direct: bool, store: Any) -> DirectBuffers | None:
        """As Rank's. Buffers that the device reaches in other processes can be made once in a process's life: those
        processes cannot be exchanged afterwards, so later epochs go without."""
        self.offers_direct = False
        if not direct or self._symmetric is None:
            return None
        with torch.inference_mode(), as_current(self._torch_device):
            return self._make_buffers(self._symmetric, store)

    def use_buffers(self, buffers: DirectBuffers | None) -> None:
        """As Rank's."""
        self._buffers, self.is_direct = buffers, buffers is not None
        for mixture in self._model.mixtures:
            mixture.use_buffers(buffers)

    def left(self) -> None:
        """As Rank's. NCCL's operations end when they are aborted, if the abort itself does; those of NVSHMEM never do."""
        if self._torch_device.type != "cuda":
            return
        with as_current(self._torch_device):
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            deadline_s = time.monotonic() + _STUCK_S
            while not done.query():
                if time.monotonic() > deadline_s:
                    raise DeviceStuck(
                        "the GPU waits for a rank that is gone, which only the end of this process can end"
                    )
                time.sleep(0.01)

    def _make_buffers(self, symmetric: Symmetric, store: Any) -> DirectBuffers:
        moe, experts = self._model.config.moe, self.experts.placement
        assert moe is not None
        return DirectBuffers(
            symmetric(store, self.layout.rank, self.layout.size, self._torch_device),
            num_ranks=self.layout.size,
            num_slots=experts.slots_per_rank,
            num_choices=moe.num_experts_per_token,
            hidden_size=self._model.config.hidden_size,
            dtype=getattr(torch, self._config.dtype),
            max_tokens=self._config.max_batch_tokens,
            exact=self._config.parallel.exact_combine,
        )

    # ---- steps ----

    def warm_up(self) -> None:
        """Compiles the kernels of both kinds of passes: this rank's part alone, on a row of the scratch block, to no purpose."""
        scratch = SequenceSlice(0, (0,), 0, (self._pool.scratch_block,))
        with torch.inference_mode(), as_current(self._torch_device):
            for inputs in (self._upload.prefill((scratch,)), self._decode_inputs((scratch,))):
                CudaErnie.logits(self._model, self._model.forward(inputs, self._pool))

    def execute_part(self, batch: Batch, step: GroupStep) -> list[Sampled]:
        """As Rank's."""
        self._step = step
        with torch.inference_mode(), as_current(self._torch_device):
            if batch.prefill or batch.decode:
                found = self.execute(batch)
            else:
                found = []
                self.hidden_states(batch)
            # What came of a broken epoch means nothing; and once this rank is said to be done, an abort in the next step
            # must not find operations of this one still under way: its keys and values are taken for good.
            self._model.links.world.settle(self._torch_device)
        return found

    def hidden_states(self, batch: Batch, on_layer: LayerHook | None = None) -> Tensor:
        """The last layer's output [T, D]; `on_layer` is not called, as blocks are shown after the step."""
        for piece in batch.prefill:
            if piece.start + len(piece.token_ids) > self.max_model_len:
                raise IndexError(f"{self.max_model_len} positions are the longest sequence of this runner")
        with torch.inference_mode(), as_current(self._torch_device):
            passes = self._passes(batch)
            if self._step.halves and len(passes) == 2:
                parts = finish_both(*(self._stages(part, is_decode) for part, is_decode in passes))
                return torch.cat(parts)
            return torch.cat([finish(self._stages(part, is_decode)) for part, is_decode in passes])

    def _passes(self, batch: Batch) -> list[tuple[Batch, bool]]:
        """What runs one after the other, and whether it decodes: the same on all ranks, whatever each has of it."""
        step = self._step
        if step.num_prefill and step.num_decode:
            return [(Batch(prefill=batch.prefill), False), (Batch(decode=batch.decode), True)]
        is_decode = not step.num_prefill
        return [(part, is_decode) for part in split(batch)] if step.halves else [(batch, is_decode)]

    def _stages(self, batch: Batch, is_decode: bool) -> Stages[Tensor]:
        if self._buffers is not None:
            self._buffers.expect(self._step.num_decode if is_decode else self._step.num_prefill)
        return self._model.stages(self._inputs(batch), self._pool, is_decode)

    def _inputs(self, batch: Batch) -> StepInputs | None:
        if batch.prefill:
            return self._upload.prefill(batch.prefill)
        return self._decode_inputs(batch.decode) if batch.decode else None

    def _decode_inputs(self, slices: Sequence[SequenceSlice]) -> StepInputs:
        num_columns = ROW_COLUMNS + -(-self.max_model_len // BLOCK_SIZE)
        host = self._upload.array(len(slices) * num_columns).reshape(len(slices), num_columns)
        fill_decode_rows(host, slices, self._pool.scratch_block)
        rows = torch.empty(len(slices), num_columns, dtype=torch.int32, device=self._torch_device)
        self._upload.send(rows)
        return StepInputs(rows)


class CudaRanks:
    """Implements workers.model.loading.RankLoader for one device; with Triton's interpreter that may be the CPU."""

    def __init__(self, device: torch.device, symmetric: Symmetric | None = None) -> None:
        """`symmetric`: in place of NVSHMEM's memory."""
        self._device, self._symmetric = device, symmetric

    def count_blocks(self, config: WorkerConfig) -> int:
        """As RankLoader's, from what the GPU has beside the weights."""
        dimensions = ErnieConfig.load(checkpoint_folder(config.model))
        layout = Layout.of(config.parallel, dimensions)
        return self._layout(
            config, dimensions, layout, free_bytes(self._device) - self._weight_bytes(config)
        ).num_blocks

    def load(
        self, config: WorkerConfig, rank: int, links: Links, placement: Placement, num_blocks: int
    ) -> CudaRankRunner:
        """As RankLoader's."""
        device, folder = self._device, checkpoint_folder(config.model)
        dimensions, checkpoint = ErnieConfig.load(folder), Checkpoint(folder)
        dimensions = with_stored_head(dimensions, checkpoint)
        layout = Layout.of(config.parallel, dimensions, rank)
        max_model_len = served_len(config, dimensions)
        dtype: torch.dtype = getattr(torch, config.dtype)
        is_direct = wants_direct(config, self._symmetric is not None or (device.type == "cuda" and is_available()))
        require_bytes(folder, self._weight_bytes(config), dtype, free_bytes(device))
        part = RankPart(layout, links, placement, config.parallel.exact_combine)
        with torch.inference_mode(), as_current(device):
            model = RankErnie(dimensions, checkpoint, dtype, max_model_len, device, config.deterministic, part)
            pool = DevicePool(own_layout(config, dimensions, layout, num_blocks), device)
        info = describe_part(config, checkpoint, dimensions, num_blocks, max_model_len, device.type)
        experts = RankExperts(
            model.mixtures, links, layout, placement, dimensions, folder,
            num_nodes=config.parallel.num_nodes, dtype=dtype, device=device,
        )  # fmt: skip
        symmetric = (self._symmetric or nvshmem) if is_direct else None
        runner = CudaRankRunner(model, pool, info, config, layout, experts, device, symmetric)
        if device.type == "cuda":
            runner.warm_up()
        return runner

    def _layout(self, config: WorkerConfig, dimensions: ErnieConfig, layout: Layout, num_free_bytes: int) -> KvLayout:
        mine = replace(dimensions, num_kv_heads=layout.share(dimensions.num_kv_heads).count)
        dtype: torch.dtype = getattr(torch, config.dtype)
        return choose_layout(config, mine, dtype, served_len(config, dimensions), max(0, num_free_bytes))

    def _weight_bytes(self, config: WorkerConfig) -> int:
        folder = checkpoint_folder(config.model)
        dimensions = with_stored_head(ErnieConfig.load(folder), Checkpoint(folder))
        layout, dtype = Layout.of(config.parallel, dimensions), getattr(torch, config.dtype)
        placement = initial_placement(config, dimensions)
        return share_bytes(dimensions, layout, placement, dtype, copies_tied_head=False)


def wants_direct(config: WorkerConfig, can: bool) -> bool:
    """Whether a rank with these settings brings rows to experts without the host, if it `can`. Raises InvalidConfig."""
    parallel = config.parallel
    if parallel.dispatch == "device" and not can:
        raise InvalidConfig(
            "worker.parallel.dispatch device needs a GPU and NVSHMEM's library (pip install nvidia-nvshmem-cu12 or -cu13); "
            "auto and all_to_all do without"
        )
    return parallel.dispatch == "device"
