"""Decides which experts move to which slots, from the load that steps have measured; knows no ranks and computes no step."""

from __future__ import annotations

from collections.abc import Iterable

from workers.config import ParallelConfig
from workers.model.parallel.expert_placement import Placement, Slots, imbalance, replan

NO_MOVE: tuple[int, Slots] = (-1, ())


class Balance:
    """Where a group's experts are, and what is still to be moved: one layer rides in each step.

    `load[layer][expert]` are tokens that chose each expert between two looks, over all ranks.
    """

    def __init__(self, parallel: ParallelConfig, placement: Placement) -> None:
        self._parallel = parallel
        self._next_look = parallel.rebalance_steps
        self._moves: list[tuple[int, Slots]] = []
        self.placement = placement
        self.load: list[list[int]] = []
        self.imbalance_seen = 1.0
        """Busiest rank's expert load over the mean, worst layer, at the last look."""

    @property
    def num_moves(self) -> int:
        return len(self._moves)

    @property
    def next_move(self) -> tuple[int, Slots]:
        """A layer and its slots; NO_MOVE when nothing is left to move."""
        return self._moves[0] if self._moves else NO_MOVE

    def moved(self) -> None:
        """All ranks have carried `next_move` out."""
        layer, slots = self._moves.pop(0)
        self.placement = self.placement.with_layer(layer, slots)

    def is_due(self, step: int) -> bool:
        """Whether the load should be looked at before this step; then not again for `rebalance_steps`."""
        if not self._parallel.rebalance_steps or step < self._next_look:
            return False
        self._next_look = step + self._parallel.rebalance_steps
        return True

    @property
    def wants_load(self) -> bool:
        """No moves are planned already, and there are experts to move."""
        return not self._moves and bool(self.placement.layers)

    def measured(self, loads: Iterable[list[list[int]]]) -> None:
        """What each rank counted since the last look."""
        self.load = [[sum(counts) for counts in zip(*layers, strict=True)] for layers in zip(*loads, strict=True)]

    def look(self, always: bool = False) -> None:
        """Plans moves when the measured load is uneven, or `always`."""
        size = self._parallel.size
        self.imbalance_seen = max(
            imbalance(slots, load, size) for slots, load in zip(self.placement.layers, self.load, strict=True)
        )
        if always or self.imbalance_seen > self._parallel.rebalance_above:
            self.plan(self.load)

    def plan(self, load: list[list[int]]) -> None:
        target = replan(self.placement, load, self._parallel.num_nodes)
        pairs = zip(self.placement.layers, target.layers, strict=True)
        self._moves = [(layer, after) for layer, (before, after) in enumerate(pairs) if before != after]
