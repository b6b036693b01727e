"""Keeps what several owners have within one bound, so that nobody's things push out those of one who has less. Knows only their sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Owner = TypeVar("Owner", bound=Hashable)

_MAX_STALE = 64
"""Entries of the heap that count no more, beside as many as there are owners."""


class Shares(Generic[Name, Owner]):
    """All together take at most `most`. Where that is exceeded, the oldest go of whoever has most, and of equals of whoever came
    first. Who that is a heap knows, so that no call looks at all owners."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._owners: dict[Name, Owner] = {}
        self._sizes: dict[Owner, OrderedDict[Name, int]] = {}
        """By owner, the oldest first."""
        self._totals: dict[Owner, int] = {}
        self._numbers = count()
        self._entries: dict[Owner, tuple[int, int, Owner]] = {}
        """An owner's entry in the heap: what it had, negative, and has not exceeded since, and its number."""
        self._heap: list[tuple[int, int, Owner]] = []
        """All entries, and such as count no more."""
        self.total = 0

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, name: Name, owner: Owner, size: int = 1) -> None:
        """The newest of its owner from now on."""
        self.remove(name)
        self._owners[name] = owner
        self._sizes.setdefault(owner, OrderedDict())[name] = size
        self._totals[owner] = total = self._totals.get(owner, 0) + size
        self.total += size
        entry = self._entries.get(owner)
        if entry is None or total > -entry[0]:
            self._entries[owner] = entry = (-total, next(self._numbers) if entry is None else entry[1], owner)
            heappush(self._heap, entry)
            if len(self._heap) > 2 * len(self._entries) + _MAX_STALE:
                self._heap = list(self._entries.values())
                heapify(self._heap)

    def remove(self, name: Name) -> None:
        """One that is not here is ignored."""
        if name not in self._owners:
            return
        owner = self._owners.pop(name)
        sizes = self._sizes[owner]
        size = sizes.pop(name)
        self.total -= size
        self._totals[owner] -= size
        if not sizes:
            del self._sizes[owner], self._totals[owner], self._entries[owner]
            if not self._entries:
                self._heap.clear()

    def take_surplus(self) -> list[Name]:
        """Removes what has to go so that the rest is within the bound."""
        found: list[Name] = []
        while self.total > self._most:
            name = next(iter(self._sizes[self._who_has_most()]))
            self.remove(name)
            found.append(name)
        return found

    def _who_has_most(self) -> Owner:
        while True:
            entry = self._heap[0]
            total, number, owner = entry
            if self._entries.get(owner) is not entry:
                heappop(self._heap)
            elif -total == self._totals[owner]:
                return owner
            else:
                self._entries[owner] = entry = (-self._totals[owner], number, owner)
                heapreplace(self._heap, entry)
