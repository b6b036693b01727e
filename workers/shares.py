"""Keeps what several owners have within one bound, so that nobody's things push out those of one who has less. Knows only their sizes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Owner = TypeVar("Owner", bound=Hashable)


class Shares(Generic[Name, Owner]):
    """All together take at most `most`. Where that is exceeded, the oldest go of whoever has most."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._owners: dict[Name, Owner] = {}
        self._sizes: dict[Owner, dict[Name, int]] = {}
        """By owner, the oldest first."""
        self._totals: dict[Owner, int] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, name: Name, owner: Owner, size: int = 1) -> None:
        """The newest of its owner from now on."""
        self.remove(name)
        self._owners[name] = owner
        self._sizes.setdefault(owner, {})[name] = size
        self._totals[owner] = self._totals.get(owner, 0) + size
        self.total += size

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
            del self._sizes[owner], self._totals[owner]

    def surplus(self) -> list[Name]:
        """What has to go so that the rest is within the bound; it stays here until it is removed."""
        over, found = self.total - self._most, list[Name]()
        if over <= 0:
            return found
        left, oldest = dict(self._totals), dict[Owner, Iterator[tuple[Name, int]]]()
        while over > 0:
            owner = max(left, key=lambda each: left[each])
            name, size = next(oldest.setdefault(owner, iter(self._sizes[owner].items())))
            left[owner] -= size
            over -= size
            found.append(name)
        return found
