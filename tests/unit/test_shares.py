"""Who has most gives up its oldest, as a look at everybody would find, but without one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.shares import Shares

STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 12), st.integers(0, 4), st.integers(0, 9)), max_size=80
)


class Plain:
    """Looks at everybody each time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.things: dict[int, tuple[int, int]] = {}
        """By name owner and size, the oldest first."""
        self.owners: dict[int, int] = {}
        """What each has all together, who came first first."""

    def add(self, name: int, owner: int, size: int) -> None:
        self.remove(name)
        self.things[name] = owner, size
        self.owners[owner] = self.owners.get(owner, 0) + size

    def remove(self, name: int) -> None:
        owner, size = self.things.pop(name, (-1, 0))
        if owner >= 0:
            self.owners[owner] -= size
            if not any(other == owner for other, _ in self.things.values()):
                del self.owners[owner]

    def take_surplus(self) -> list[int]:
        found = []
        while sum(self.owners.values()) > self.most:
            owner = max(self.owners, key=lambda each: self.owners[each])
            found.append(next(name for name, thing in self.things.items() if thing[0] == owner))
            self.remove(found[-1])
        return found


@given(STEPS)
def test_what_goes_is_the_oldest_of_whoever_has_most(steps: list[tuple[str, int, int, int]]) -> None:
    shares, plain = Shares[int, int](20), Plain(20)
    for what, name, owner, size in steps:
        if what == "add":
            shares.add(name, owner, size)
            plain.add(name, owner, size)
        else:
            shares.remove(name)
            plain.remove(name)
        assert shares.take_surplus() == plain.take_surplus()
        assert (len(shares), shares.total) == (len(plain.things), sum(plain.owners.values()))
        assert len(shares._heap) <= 2 * len(plain.owners) + 65


@dataclass(frozen=True)
class Looked:
    """An owner that counts how often somebody looks anything of it up."""

    number: int
    counts: list[int]

    def __hash__(self) -> int:
        self.counts[0] += 1
        return self.number


@pytest.mark.parametrize("has_much", [True, False])
def test_what_an_addition_costs_does_not_grow_with_the_owners(has_much: bool) -> None:
    """Of new owners with one thing each, and of one that has most and comes and goes."""
    cost = {}
    for num_owners in (100, 10_000):
        counts = [0]
        shares: Shares[int, Looked] = Shares(num_owners)
        for number in range(num_owners):
            shares.add(number, Looked(number, counts))
        counts[0] = 0
        for number in range(1000):
            name = num_owners + number
            shares.add(name, Looked(num_owners if has_much else name, counts))
            assert len(shares.take_surplus()) == 1
        cost[num_owners] = counts[0]
    assert cost[10_000] <= 2 * cost[100]
