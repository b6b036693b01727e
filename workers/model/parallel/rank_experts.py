"""The experts in one rank's slots: their load, their moves from rank to rank, and their return from the checkpoint.

The same for every kind of mixture layer; knows no steps. Shapes: E experts, D hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.parallel.collectives import Links
from workers.model.parallel.expert_dispatch import ExpertTable
from workers.model.parallel.expert_placement import Placement, Slots, moves
from workers.model.parallel.layout import Layout


class Mixture(Protocol):
    """A mixture layer, as far as its slots go."""

    load_E: Tensor | None

    def use_table(self, table: ExpertTable) -> None:
        """Experts are where `table` says from now on."""

    def expert_bytes(self, slot: int) -> Tensor:
        """The weights in a slot, flat uint8: gate [F, D], up [F, D], down [D, F]."""

    def rearrange(self, sources: Sequence[int | Tensor]) -> None:
        """Fills every slot anew: from a slot as it was, or with weights as `expert_bytes` gives them."""


class RankExperts:
    """What sits in a rank's slots, and how that changes. All ranks of a group call `move` alike."""

    def __init__(
        self,
        mixtures: Sequence[Mixture],
        links: Links,
        layout: Layout,
        placement: Placement,
        model: ErnieConfig,
        folder: Path,
        *,
        num_nodes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._mixtures, self._links, self._layout = mixtures, links, layout
        self._model, self._folder, self._num_nodes = model, folder, num_nodes
        self._dtype, self._device = dtype, device
        self.placement = placement
        """Which expert is where, as this rank holds and routes it now."""
        if model.moe is not None:
            for mixture in mixtures:
                mixture.load_E = torch.zeros(model.moe.num_experts, dtype=torch.int64, device=device)

    def take_load(self) -> list[list[int]]:
        """Tokens that chose each expert [layer][expert] on this rank since the last call."""
        found = []
        for mixture in self._mixtures:
            assert mixture.load_E is not None
            found.append(mixture.load_E.tolist())
            mixture.load_E.zero_()
        return found

    def move(self, layer: int, slots: Slots) -> None:
        """Gives mixture layer `layer` new slots; weights come from the ranks that have them. All ranks call this together.

        Raises RankLost when the group breaks; `adopt` then puts right what is half done.
        """
        mixture = self._mixtures[layer]
        rank, size = self._layout.rank, self.placement.slots_per_rank
        before = self.placement.layers[layer]
        sources: dict[int, int | Tensor] = {
            at: at for at in range(size) if before[rank * size + at] == slots[rank * size + at]
        }
        leaving: list[Tensor] = []
        send, receive = [0] * self._layout.size, [0] * self._layout.size
        arriving_at: list[int] = []
        steps = moves(before, slots, self._layout.size, self._num_nodes)
        for other in range(self._layout.size):
            for step in steps:
                source, target = step.source_slot // size, step.target_slot // size
                if source == rank and target == rank and other == rank:
                    sources[step.target_slot % size] = step.source_slot % size
                elif source == rank and target == other:
                    leaving.append(mixture.expert_bytes(step.source_slot % size))
                    send[other] += 1
                elif source == other and target == rank:
                    arriving_at.append(step.target_slot % size)
                    receive[other] += 1
        blob = mixture.expert_bytes(0)
        rows = torch.stack(leaving) if leaving else blob.new_empty(0, len(blob))
        arriving, pending = self._links.world.all_to_all(rows, send, receive)
        pending.settle()
        sources |= dict(zip(arriving_at, arriving, strict=True))
        self._use(layer, slots, [sources[at] for at in range(size)])

    def adopt(self, placement: Placement) -> None:
        """Brings this rank alone to a placement: what it lacks it reads from the checkpoint.

        For ranks that an interrupted `move` left apart; a rank that holds the right experts reads nothing.
        """
        checkpoint: Checkpoint | None = None
        for layer in range(len(self._mixtures)):
            if self.placement.layers[layer] == placement.layers[layer]:
                continue
            held = self.placement.held_by(layer, self._layout.rank)
            sources: list[int | Tensor] = []
            for expert in placement.held_by(layer, self._layout.rank):
                if expert in held:
                    sources.append(held.index(expert))
                    continue
                checkpoint = checkpoint or Checkpoint(self._folder)
                sources.append(self._read(checkpoint, layer, expert))
            self._use(layer, placement.layers[layer], sources)

    @property
    def expert_bytes(self) -> int:
        """What one expert's weights weigh on the way."""
        return len(self._mixtures[0].expert_bytes(0)) if self._mixtures else 0

    def _use(self, layer: int, slots: Slots, sources: Sequence[int | Tensor]) -> None:
        assert self._model.moe is not None
        mixture = self._mixtures[layer]
        mixture.rearrange(sources)
        mixture.use_table(ExpertTable(slots, self._model.moe.num_experts, self._layout.size, self._device))
        self.placement = self.placement.with_layer(layer, slots)

    def _read(self, checkpoint: Checkpoint, layer: int, expert: int) -> Tensor:
        moe, D = self._model.moe, self._model.hidden_size
        assert moe is not None
        index = [at for at in range(self._model.num_layers) if moe.has_layer(at)][layer]
        prefix, F = f"model.layers.{index}.mlp.experts.{expert}", moe.intermediate_size
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        read = [
            checkpoint.take(f"{prefix}.{name}_proj.weight", shape, self._dtype).flatten()
            for name, shape in shapes.items()
        ]
        return torch.cat(read).view(torch.uint8)
