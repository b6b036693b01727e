"""Copies of KV blocks between the model's memory and that of transfers, no more of them between two steps than a bite; knows no sequences."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.errors import RankLost
from workers.kv_memory.memory import KvMemory

Then = Callable[[RankLost | None], None]


@dataclass(slots=True)
class _Copy:
    blocks: deque[int]
    is_wanted: Callable[[], bool]
    then: Then


class Bites:
    """First come first served. `copy(blocks)` does one bite; where the memory copies nothing, all of it is done at once."""

    def __init__(self, memory: KvMemory, copy: Callable[[Sequence[int]], None]) -> None:
        self._memory = memory
        self._copy = copy
        self._waiting: dict[int, _Copy] = {}
        self._numbers = itertools.count()
        self._num_left = memory.blocks_per_bite
        """Blocks that may still be copied before the next step."""

    @property
    def is_busy(self) -> bool:
        """Blocks wait for the next bite."""
        return bool(self._waiting)

    def add(self, blocks: Sequence[int], is_wanted: Callable[[], bool], then: Then) -> int:
        """`then` hears, now or in a later step, that all are copied, or what lost them; it hears nothing once they are not wanted,
        and then they may have another owner. Returns a number for `drop`."""
        number = next(self._numbers)
        self._waiting[number] = _Copy(deque(blocks), is_wanted, then)
        self._take()
        return number

    def waits(self, number: int) -> bool:
        """Whether some of these blocks wait for another step."""
        return number in self._waiting

    def drop(self, number: int) -> None:
        """Nothing is copied or said of these blocks any more."""
        self._waiting.pop(number, None)

    def advance(self) -> None:
        """Once a step."""
        self._num_left = self._memory.blocks_per_bite
        self._take()

    def _take(self) -> None:
        while self._waiting:
            number, copy = next(iter(self._waiting.items()))
            if not copy.is_wanted():
                del self._waiting[number]
                continue
            count = min(len(copy.blocks), self._num_left) if self._memory.copies else len(copy.blocks)
            if copy.blocks and not count:
                return
            bite = [copy.blocks.popleft() for _ in range(count)]
            self._num_left -= count
            error = None
            try:
                self._copy(bite)
            except RankLost as lost:
                error = lost
            if error is not None or not copy.blocks:
                del self._waiting[number]
                copy.then(error)
