"""The blocks of one tier in the order in which they were used; knows no memory and no disk."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")
D = TypeVar("D")


class UseOrder(Generic[V]):
    """Values by hash, least recently used first. Those that are in `pins` stand aside, so that whoever looks for the coldest passes
    none of them; who changes `pins` says so with `pinned` and `unpinned`."""

    def __init__(self, pins: Counter[int]) -> None:
        self._pins = pins
        self._idle: OrderedDict[int, V] = OrderedDict()
        self._aside: dict[int, V] = {}

    def __len__(self) -> int:
        return len(self._idle) + len(self._aside)

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._idle or block_hash in self._aside

    def __iter__(self) -> Iterator[int]:
        """Of the idle ones the coldest first."""
        yield from self._aside
        yield from self._idle

    def get(self, block_hash: int, default: D) -> V | D:
        found = self._idle.get(block_hash, default)
        return found if found is not default else self._aside.get(block_hash, default)

    def put(self, block_hash: int, value: V) -> None:
        """As the one used last."""
        (self._aside if block_hash in self._pins else self._idle)[block_hash] = value

    def pop(self, block_hash: int) -> V:
        return self._aside.pop(block_hash) if block_hash in self._aside else self._idle.pop(block_hash)

    def clear(self) -> None:
        self._idle.clear()
        self._aside.clear()

    def used(self, block_hash: int) -> None:
        if block_hash in self._idle:
            self._idle.move_to_end(block_hash)

    def spare(self, block_hash: int) -> None:
        """It is the first to go."""
        if block_hash in self._idle:
            self._idle.move_to_end(block_hash, last=False)

    def coldest(self) -> int | None:
        """None: there is none, or all are pinned."""
        return next(iter(self._idle), None)

    def pinned(self, block_hash: int) -> None:
        if block_hash in self._idle:
            self._aside[block_hash] = self._idle.pop(block_hash)

    def unpinned(self, block_hash: int) -> None:
        """It counts as used now."""
        if block_hash in self._aside:
            self._idle[block_hash] = self._aside.pop(block_hash)
