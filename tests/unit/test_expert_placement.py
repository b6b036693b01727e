"""Placement keeps every expert, evens out measured load, respects nodes, and moves no more than it must."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.model.parallel.expert_placement import (
    Placement,
    Slots,
    copies_of,
    imbalance,
    initial,
    moves,
    place,
    rank_loads,
    replan,
)


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, int, int, int, list[float]]:
    """(experts, ranks, slots a rank, nodes, load)."""
    nodes = draw(st.sampled_from([1, 2]))
    ranks = nodes * draw(st.integers(1, 4))
    num_experts = draw(st.integers(ranks, 24))
    slots = -(-num_experts // ranks) + draw(st.integers(0, 2))
    slots = min(slots, num_experts)
    load = draw(st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts))
    return num_experts, ranks, slots, nodes, [float(value) for value in load]


@settings(deadline=None)
@given(groups())
def test_every_expert_has_a_slot_and_load_is_only_divided(group: tuple[int, int, int, int, list[float]]) -> None:
    num_experts, ranks, size, nodes, load = group
    slots = place(load, ranks, size, nodes)
    assert len(slots) == ranks * size
    assert set(slots) == set(range(num_experts))
    assert abs(sum(rank_loads(slots, load, ranks)) - sum(load)) < 1e-6 * (1 + sum(load))
    assert imbalance(slots, load, ranks) >= 1 - 1e-9


@settings(deadline=None)
@given(groups(), st.randoms(use_true_random=False))
def test_moves_turn_one_placement_into_the_other(group: tuple[int, int, int, int, list[float]], random: object) -> None:
    num_experts, ranks, size, nodes, load = group
    before = place(list(range(num_experts)), ranks, size, nodes)
    after = place(load, ranks, size, nodes, before)
    steps = moves(before, after, ranks, nodes)
    found = list(before)
    for step in steps:
        found[step.target_slot] = before[step.source_slot]
    assert tuple(found) == after
    assert len({step.target_slot for step in steps}) == len(steps)
    assert moves(after, after, ranks, nodes) == []


def zipf(num_experts: int, step: int) -> list[float]:
    """A skewed load whose heavy experts lie scattered."""
    return [1000 / (1 + (expert * step) % num_experts) for expert in range(num_experts)]


def test_a_skewed_load_is_evened_out_with_few_redundant_experts() -> None:
    for exponent in (0.9, 1.0, 1.1):
        load = [[1 / (1 + expert) ** exponent for expert in range(64)]]  # the heaviest are neighbours
        start = initial(1, 64, 8, 8)
        assert imbalance(start.layers[0], load[0], 8) > 2.0
        assert imbalance(replan(start, load).layers[0], load[0], 8) < 1.15


def test_nodes_carry_equal_load_before_ranks_do() -> None:
    load = zipf(64, 9)
    slots = place(load, 16, 5, num_nodes=2)
    per_node = rank_loads(slots, load, 2)
    assert max(per_node) / min(per_node) < 1.02
    assert imbalance(slots, load, 16) < 1.15


def test_a_busier_expert_gets_more_copies_but_no_more_than_ranks() -> None:
    assert copies_of([100, 1, 1, 1], 8, 4) == [4, 2, 1, 1]
    assert copies_of([9, 3, 3, 3], 6, 4) == [3, 1, 1, 1]


def test_an_even_load_moves_nothing() -> None:
    start = initial(3, 64, 8, 0)
    assert replan(start, [[5.0] * 64] * 3) == start
    assert replan(start, [[0.0] * 64] * 3) == start


def test_a_layer_that_would_not_get_better_stays() -> None:
    start = initial(2, 8, 2, 0)
    skewed = [8.0, 8, 8, 8, 1, 1, 1, 1]
    found = replan(start, [[1.0] * 8, skewed])
    assert found.layers[0] == start.layers[0] and found.layers[1] != start.layers[1]
    assert imbalance(found.layers[1], skewed, 2) == 1.0


def test_experts_stay_in_their_slots_where_they_can() -> None:
    before: Slots = (0, 1, 2, 3, 4, 5, 6, 7)
    load = [4.0, 1, 1, 1, 4, 1, 1, 1]
    assert place(load, 2, 4, 1, before)[0] in (0, 1) and len(moves(before, place(load, 2, 4, 1, before), 2)) <= 6


def test_weights_come_from_the_nearest_rank() -> None:
    before: Slots = (0, 1, 2, 3, 0, 1, 2, 3)  # four ranks, two a node
    after: Slots = (0, 1, 2, 0, 0, 1, 2, 3)
    (step,) = moves(before, after, 4, 2)
    assert (step.source_slot, step.target_slot) == (0, 3)


def test_a_rank_holds_the_run_of_slots_that_is_its_own() -> None:
    placement = initial(2, 8, 4, 4)
    assert placement.slots_per_rank == 3
    assert [placement.held_by(0, rank) for rank in range(4)] == [(0, 1, 2), (3, 4, 5), (6, 7, 0), (1, 2, 3)]
    changed = placement.with_layer(1, (*range(8), 4, 5, 6, 7))
    assert changed.layers[0] == placement.layers[0] and changed != placement
    assert isinstance(changed, Placement)
