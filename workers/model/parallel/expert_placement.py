"""Decides which expert sits in which slot of which rank, from measured load: copies of busy experts, packed by node, then by rank.

Integers only: moves no weights. The idea is that of DeepSeek's expert-parallel load balancer (DeepSeek-V3 technical
report, section 3.4); a layer's placement is computed on its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_SWAP_ROUNDS = 48
"""Improvements tried per layer after the greedy packing; each is a swap of two copies."""

Slots = tuple[int, ...]
"""The expert in each slot of a layer: rank 0's slots, then rank 1's, and so on."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The slots of every mixture layer, in order of layer. Every expert has at least one slot."""

    num_ranks: int
    layers: tuple[Slots, ...]

    @property
    def slots_per_rank(self) -> int:
        return len(self.layers[0]) // self.num_ranks if self.layers else 0

    def held_by(self, layer: int, rank: int) -> Slots:
        """The experts in a rank's own slots."""
        size = self.slots_per_rank
        return self.layers[layer][rank * size : (rank + 1) * size]

    def with_layer(self, layer: int, slots: Slots) -> Placement:
        return Placement(self.num_ranks, (*self.layers[:layer], slots, *self.layers[layer + 1 :]))


@dataclass(frozen=True, slots=True)
class Move:
    """An expert's weights go from a global slot, as it was, to a global slot, as it will be."""

    source_slot: int
    target_slot: int


def initial(num_layers: int, num_experts: int, num_ranks: int, num_redundant: int) -> Placement:
    """Experts in order over the ranks, and then the first ones again."""
    slots = tuple(slot % num_experts for slot in range(num_experts + num_redundant))
    return Placement(num_ranks, (slots,) * num_layers)


def replan(current: Placement, load: Sequence[Sequence[float]], num_nodes: int = 1) -> Placement:
    """The placement for a measured load [layer][expert]; layers that would not get better stay as they are."""
    layers = []
    for slots, layer_load in zip(current.layers, load, strict=True):
        found = place(layer_load, current.num_ranks, current.slots_per_rank, num_nodes, slots)
        is_better = imbalance(found, layer_load, current.num_ranks) < imbalance(slots, layer_load, current.num_ranks)
        layers.append(found if is_better else slots)
    return Placement(current.num_ranks, tuple(layers))


def place(
    load: Sequence[float], num_ranks: int, slots_per_rank: int, num_nodes: int = 1, current: Slots | None = None
) -> Slots:
    """One layer's slots: ranks carry about equal load, nodes too, and as much as possible stays where it is in `current`."""
    copies = copies_of(load, num_ranks * slots_per_rank, num_ranks)
    weight = [share / count for share, count in zip(load, copies, strict=True)]
    items = sorted((expert for expert, count in enumerate(copies) for _ in range(count)), key=lambda e: -weight[e])
    ranks_per_node = num_ranks // num_nodes
    bins: list[list[int]] = []
    nodes = _pack(items, weight, num_nodes, ranks_per_node * slots_per_rank)
    if current is not None:
        nodes = _match(nodes, _cut(current, num_nodes))
    for node, held in enumerate(nodes):
        held = sorted(held, key=lambda expert: -weight[expert])
        ranks = _pack(held, weight, ranks_per_node, slots_per_rank)
        _swap(ranks, weight)
        if current is not None:
            ranks = _match(ranks, _cut(current, num_ranks)[node * ranks_per_node : (node + 1) * ranks_per_node])
        bins += ranks
    if current is None:
        return tuple(expert for held in bins for expert in sorted(held))
    return tuple(
        expert
        for held, before in zip(bins, _cut(current, num_ranks), strict=True)
        for expert in _keep_places(held, before)
    )


def copies_of(load: Sequence[float], num_slots: int, max_copies: int) -> list[int]:
    """How many slots each expert gets: one, and further ones where the load a copy carries is highest."""
    copies = [1] * len(load)
    for _ in range(num_slots - len(load)):
        open_ = [expert for expert in range(len(load)) if copies[expert] < max_copies]
        busiest = max(open_, key=lambda expert: (load[expert] / copies[expert], -expert))
        copies[busiest] += 1
    return copies


def rank_loads(slots: Slots, load: Sequence[float], num_ranks: int) -> list[float]:
    """What each rank carries when an expert's load is divided evenly among its copies."""
    copies = Counter(slots)
    return [sum(load[expert] / copies[expert] for expert in held) for held in _cut(slots, num_ranks)]


def imbalance(slots: Slots, load: Sequence[float], num_ranks: int) -> float:
    """Load of the busiest rank over the mean; 1 is perfect, and so is no load at all."""
    loads = rank_loads(slots, load, num_ranks)
    total = sum(loads)
    return max(loads) * num_ranks / total if total else 1.0


def moves(before: Slots, after: Slots, num_ranks: int, num_nodes: int = 1) -> list[Move]:
    """Which weights must go where: from the own rank if it has them, else the own node, sources taking turns."""
    size, per_node = len(before) // num_ranks, len(before) // num_nodes
    given: Counter[int] = Counter()
    found = []
    for target, expert in enumerate(after):
        if before[target] == expert:
            continue
        sources = [slot for slot, held in enumerate(before) if held == expert]
        source = min(
            sources,
            key=lambda slot: (
                slot // size != target // size, slot // per_node != target // per_node, given[slot // size], slot,
            ),
        )  # fmt: skip
        given[source // size] += 1
        found.append(Move(source, target))
    return found


def _pack(items: Sequence[int], weight: Sequence[float], num_bins: int, capacity: int) -> list[list[int]]:
    """Longest processing time first; a bin takes an expert twice only when no other bin has room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0.0] * num_bins
    for expert in items:
        room = [at for at in range(num_bins) if len(bins[at]) < capacity]
        # a node may need several copies of an expert, but the fewer the better
        best = min(room, key=lambda at: (bins[at].count(expert), totals[at], len(bins[at]), at))
        bins[best].append(expert)
        totals[best] += weight[expert]
    return bins


def _swap(bins: list[list[int]], weight: Sequence[float]) -> None:
    """Exchanges copies between the busiest bin and another as long as the larger of the two gets smaller."""
    totals = [sum(weight[expert] for expert in held) for held in bins]
    for _ in range(_SWAP_ROUNDS):
        high = max(range(len(bins)), key=lambda at: totals[at])
        best = (totals[high], -1, 0, 0)
        for other in range(len(bins)):
            if other == high:
                continue
            for i, mine in enumerate(bins[high]):
                for j, theirs in enumerate(bins[other]):
                    gain = weight[mine] - weight[theirs]
                    larger = max(totals[high] - gain, totals[other] + gain)
                    if larger < best[0] and mine not in bins[other] and theirs not in bins[high]:
                        best = (larger, other, i, j)
        _, other, i, j = best
        if other < 0 or best[0] > totals[high] * (1 - 1e-6):
            return
        gain = weight[bins[high][i]] - weight[bins[other][j]]
        bins[high][i], bins[other][j] = bins[other][j], bins[high][i]
        totals[high] -= gain
        totals[other] += gain


def _match(bins: list[list[int]], before: list[Slots]) -> list[list[int]]:
    """The bins in the order in which most of what each place holds stays; greedy, largest overlap first."""
    overlaps = sorted(
        ((sum((Counter(held) & Counter(old)).values()), at, place) for at, held in enumerate(bins)
         for place, old in enumerate(before)),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )  # fmt: skip
    taken: dict[int, int] = {}
    placed: set[int] = set()
    for _, at, place in overlaps:
        if at not in placed and place not in taken:
            taken[place] = at
            placed.add(at)
    return [bins[taken[place]] for place in range(len(before))]


def _keep_places(held: Sequence[int], before: Slots) -> list[int]:
    """One rank's experts, in their former slots where they were here before."""
    left = Counter(held)
    slots: list[int | None] = []
    for expert in before:
        stays = left[expert] > 0
        left[expert] -= stays
        slots.append(expert if stays else None)
    arriving = iter(sorted(left.elements()))
    return [next(arriving) if expert is None else expert for expert in slots]


def _cut(slots: Slots, parts: int) -> list[Slots]:
    size = len(slots) // parts
    return [slots[at * size : (at + 1) * size] for at in range(parts)]
