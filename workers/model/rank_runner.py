"""One rank's part of a model, run step by step and moved expert by expert; knows no leader and no other process.

Shapes: T rows of a step, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.kv_transfer.memory import KvLayout, KvMemory
from workers.model.collectives import Links
from workers.model.ernie import Ernie, Part, mixture_index
from workers.model.ernie_config import ErnieConfig
from workers.model.expert_dispatch import AllToAll, ExpertTable
from workers.model.expert_placement import Placement, Slots, initial, moves
from workers.model.kv_memory import KvPool, available_bytes, choose_layout, kv_layout
from workers.model.layers import FeedForward
from workers.model.model_runner import describe_model, require_bytes, served_len
from workers.model.moe import MixtureOfExperts
from workers.model.parallel import Layout, Share, require_device
from workers.model.self_test import require_invariance
from workers.model.torch_runner import TorchRunner
from workers.model.weights import Checkpoint, checkpoint_folder
from workers.runner import Batch, LayerHook, Sampled
from workers.status import ModelInfo


class RankRunner(TorchRunner):
    """What a rank computes of a step. All ranks of a group call the same methods in the same order."""

    def __init__(
        self,
        model: Ernie,
        memory: KvMemory,
        info: ModelInfo,
        config: WorkerConfig,
        layout: Layout,
        placement: Placement,
    ) -> None:
        super().__init__(model, memory, info, config.num_threads)
        self._ernie = model
        self._config = config
        self.layout = layout
        self.placement = placement
        """Which expert is where, as this rank holds and routes it now."""
        self._halves = False
        if model.config.moe is not None:
            for mixture in model.mixtures:
                mixture.load_E = torch.zeros(model.config.moe.num_experts, dtype=torch.int64)

    def own_layout(self, num_blocks: int) -> KvLayout:
        """A pool with this rank's heads alone."""
        return replace(self.group_layout(num_blocks), num_blocks=num_blocks, num_kv_heads=self._own_heads.count)

    def group_layout(self, num_blocks: int) -> KvLayout:
        """As the function of that name."""
        return group_layout(self._config, self._ernie.config, self.layout, num_blocks)

    @property
    def _own_heads(self) -> Share:
        return self.layout.share(self._ernie.config.num_kv_heads)

    def use_memory(self, memory: KvMemory, first_block: int = 0) -> None:
        """Keeps keys and values in `memory` from now on; what was computed before is forgotten.

        A memory with all heads is the whole group's, on this host: this rank takes its own heads of it. One with as many
        heads as this rank has is its own. `first_block` is the memory's first block less the first id in batches.
        """
        mine = self._own_heads
        is_own = memory.layout.num_kv_heads == mine.count
        self._memory = memory
        self._pool = KvPool(memory, None if is_own else mine, first_block)

    def execute_part(self, batch: Batch, halves: bool = False) -> list[Sampled]:
        """This rank's part of a step; with an empty batch it computes for the others alone. `halves`: overlap."""
        self._halves = halves
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
            return self._ernie.compute_halves(first, second, self._pool)

    def take_load(self) -> list[list[int]]:
        """Tokens that chose each expert [layer][expert] on this rank since the last call."""
        found = []
        for mixture in self._ernie.mixtures:
            assert mixture.load_E is not None
            found.append(mixture.load_E.tolist())
            mixture.load_E.zero_()
        return found

    def move_experts(self, layer: int, slots: Slots) -> None:
        """Gives mixture layer `layer` new slots; weights come from the ranks that have them. All ranks call this together.

        Raises RankLost when the group breaks; `adopt` then puts right what is half done.
        """
        mixture = self._ernie.mixtures[layer]
        links, rank, size = self._ernie.links, self.layout.rank, self.placement.slots_per_rank
        before = self.placement.layers[layer]
        steps = moves(before, slots, self.layout.size, self._config.parallel.num_nodes)
        experts: dict[int, FeedForward] = {
            at: mixture.experts[at] for at in range(size) if before[rank * size + at] == slots[rank * size + at]
        }
        leaving: list[Tensor] = []
        send, receive = [0] * self.layout.size, [0] * self.layout.size
        arriving_at: list[int] = []
        for other in range(self.layout.size):
            for step in steps:
                source, target = step.source_slot // size, step.target_slot // size
                if source == rank and target == rank and other == rank:
                    experts[step.target_slot % size] = mixture.experts[step.source_slot % size]
                elif source == rank and target == other:
                    leaving.append(_to_bytes(mixture.experts[step.source_slot % size]))
                    send[other] += 1
                elif source == other and target == rank:
                    arriving_at.append(step.target_slot % size)
                    receive[other] += 1
        template = mixture.experts[0]
        blob = _to_bytes(template)
        rows = torch.stack(leaving) if leaving else blob.new_empty(0, len(blob))
        arriving, pending = links.world.all_to_all(rows, send, receive)
        pending.wait()
        for at, bytes_ in zip(arriving_at, arriving, strict=True):
            experts[at] = _from_bytes(bytes_, template)
        self._use(mixture, layer, slots, [experts[at] for at in range(size)])

    def adopt(self, placement: Placement) -> None:
        """Brings this rank alone to a placement: what it lacks it reads from the checkpoint.

        For ranks that an interrupted `move_experts` left apart; a rank that holds the right experts reads nothing.
        """
        checkpoint: Checkpoint | None = None
        size = self.placement.slots_per_rank
        for layer, mixture in enumerate(self._ernie.mixtures):
            if self.placement.layers[layer] == placement.layers[layer]:
                continue
            held = dict(zip(self.placement.held_by(layer, self.layout.rank), mixture.experts, strict=True))
            experts = []
            for expert in placement.held_by(layer, self.layout.rank):
                if expert not in held:
                    checkpoint = checkpoint or Checkpoint(checkpoint_folder(self._config.model))
                    held[expert] = self._read_expert(checkpoint, layer, expert, mixture.experts[0])
                experts.append(held[expert])
            assert len(experts) == size
            self._use(mixture, layer, placement.layers[layer], experts)

    def expert_bytes(self) -> int:
        """What one expert's weights weigh on the way."""
        return len(_to_bytes(self._ernie.mixtures[0].experts[0])) if self._ernie.mixtures else 0

    def _use(self, mixture: MixtureOfExperts, layer: int, slots: Slots, experts: list[FeedForward]) -> None:
        assert isinstance(mixture.exchange, AllToAll) and self._ernie.config.moe is not None
        table = ExpertTable(slots, self._ernie.config.moe.num_experts, self.layout.size, torch.device("cpu"))
        mixture.experts = experts
        mixture.exchange.table = table
        self.placement = self.placement.with_layer(layer, slots)

    def _read_expert(self, checkpoint: Checkpoint, layer: int, expert: int, template: FeedForward) -> FeedForward:
        moe, D = self._ernie.config.moe, self._ernie.config.hidden_size
        assert moe is not None
        index = next(
            at for at in range(self._ernie.config.num_layers) if moe.has_layer(at) and mixture_index(moe, at) == layer
        )
        prefix, F = f"model.layers.{index}.mlp.experts.{expert}", moe.intermediate_size
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        read = {
            name: checkpoint.take(f"{prefix}.{name}_proj.weight", shape, template.down.dtype)
            for name, shape in shapes.items()
        }
        return _like(FeedForward(read["gate"], read["up"], read["down"]), template)


def load_rank(config: WorkerConfig, rank: int, links: Links, placement: Placement, num_blocks: int = 0) -> RankRunner:
    """Loads one rank's share of config.model. `num_blocks` 0: as many KV blocks as the settings give.

    Raises InvalidConfig when the model cannot be cut so or does not fit.
    """
    folder = checkpoint_folder(config.model)
    dimensions = ErnieConfig.load(folder)
    require_device(config.parallel, config.device)
    layout = Layout.of(config.parallel, dimensions, rank)
    max_model_len = served_len(config, dimensions)
    torch.set_num_threads(config.num_threads)
    dtype: torch.dtype = getattr(torch, config.dtype)
    checkpoint = Checkpoint(folder)
    require_bytes(folder, share_bytes(dimensions, layout, placement, dtype), dtype, available_bytes())
    part = Part(layout, links, placement, config.parallel.exact_combine)
    with torch.inference_mode():
        model = Ernie(dimensions, checkpoint, dtype, max_model_len, part)
        warnings = require_invariance(model, dtype)
    memory = KvMemory(rank_layout(config, dimensions, layout, max_model_len, num_blocks))
    # the KV of a whole pool, not of this rank's heads: groups of other shapes hold the same values
    whole = kv_layout(dimensions, dtype, memory.layout.num_blocks)
    info = describe_model(config, checkpoint, whole, dimensions.vocab_size, max_model_len, "torch")
    runner = RankRunner(model, memory, info, config, layout, placement)
    runner.warnings = warnings
    return runner


def group_layout(config: WorkerConfig, dimensions: ErnieConfig, layout: Layout, num_blocks: int) -> KvLayout:
    """The memory of all pools of `num_blocks` each, with all heads: what one rank that serves alone has."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return kv_layout(dimensions, dtype, num_blocks * layout.num_pools)


def rank_layout(
    config: WorkerConfig, dimensions: ErnieConfig, layout: Layout, max_model_len: int, num_blocks: int = 0
) -> KvLayout:
    """The pool of one rank: all blocks of its sequences, with its own heads."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    mine = replace(dimensions, num_kv_heads=layout.share(dimensions.num_kv_heads).count)
    if num_blocks:
        return kv_layout(mine, dtype, num_blocks)
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


def share_bytes(config: ErnieConfig, layout: Layout, placement: Placement, dtype: torch.dtype) -> int:
    """Memory that a rank's weights take."""
    D, t = config.hidden_size, layout.tensor
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * D // t
    values = 2 * config.vocab_size * D // t + D  # the table, and the head that is packed apart even where it is tied
    for index in range(config.num_layers):
        values += heads + 2 * D
        moe = config.moe
        if moe is None or not moe.has_layer(index):
            values += 3 * config.intermediate_size * D // t
            continue
        held = placement.slots_per_rank if layout.size > 1 else moe.num_experts
        values += 3 * moe.intermediate_size * D * (held + moe.num_shared_experts)
        values += (D + 1) * moe.num_experts * 4 // dtype.itemsize
    return values * dtype.itemsize


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


def _to_bytes(expert: FeedForward) -> Tensor:
    parts = [linear.weight().contiguous().view(-1).view(torch.uint8) for linear in expert.linears]
    return torch.cat(parts)


def _from_bytes(blob: Tensor, template: FeedForward) -> FeedForward:
    gate_up, down = template.linears
    num_bytes = gate_up.num_outputs * gate_up.num_inputs * gate_up.dtype.itemsize
    gate_up_XD = blob[:num_bytes].clone().view(gate_up.dtype).view(gate_up.num_outputs, gate_up.num_inputs)
    down_DF = blob[num_bytes:].clone().view(down.dtype).view(down.num_outputs, down.num_inputs)
    gate_FD, up_FD = gate_up_XD.chunk(2)
    return _like(FeedForward(gate_FD, up_FD, down_DF), template)


def _like(expert: FeedForward, template: FeedForward) -> FeedForward:
    if template.down.is_tiled:
        for linear in expert.linears:
            linear.use_tiles()
    return expert
