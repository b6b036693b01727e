"""Owns the ids of KV blocks: who holds each, which are free, which may be evicted; knows nothing of what they contain."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable

from workers.errors import InvariantViolated


class OutOfBlocks(Exception):
    """The pool cannot give that many blocks now; nothing was taken."""


class BlockPool:
    """Reference-counted block ids first_block .. first_block+num_blocks-1.

    A block is held (count > 0), cached (count 0, its content may be wanted again) or free. `allocate` takes free
    blocks first, then evicts cached ones, least recently released first, and tells `on_evict` of all of them at once,
    before anybody can write into them.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[list[int]], None], first_block: int = 0) -> None:
        self.num_blocks = num_blocks
        ids = range(first_block, first_block + num_blocks)
        self._counts = dict.fromkeys(ids, 0)
        self._free: deque[int] = deque(ids)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds."""
        counts = self._counts
        return sum(not counts[block] for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each held once. Raises OutOfBlocks and takes nothing when there are fewer."""
        if count > self.num_available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_available} available")
        free, cached = self._free, self._cached
        blocks = [free.popleft() for _ in range(min(count, len(free)))]
        evicted = [cached.popitem(last=False)[0] for _ in range(count - len(blocks))]
        blocks += evicted
        self._counts.update(dict.fromkeys(blocks, 1))
        if evicted:
            self._on_evict(evicted)
        return blocks

    def evict(self, count: int) -> None:
        """So many cached blocks, or all, become free, as if `allocate` had wanted them."""
        evicted = [self._cached.popitem(last=False)[0] for _ in range(min(count, len(self._cached)))]
        self._free.extend(evicted)
        if evicted:
            self._on_evict(evicted)

    def drop_cached(self) -> None:
        """Cached blocks become free: their content is gone."""
        self._free.extend(self._cached)
        self._cached.clear()

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each block; cached blocks become held again."""
        for block in blocks:
            if self._counts[block] == 0 and self._cached.pop(block, 0) == 0:
                raise InvariantViolated(f"block {block} is free and cannot be shared")
            self._counts[block] += 1

    def release(self, blocks: Iterable[int], is_cached: Callable[[int], bool]) -> None:
        """One holder less for each block; at none it becomes cached if `is_cached` says so, else free.

        Blocks are released last first, so that of one sequence the tail is evicted before the head.
        """
        counts = self._counts
        for block in reversed(list(blocks)):
            count = counts[block] - 1
            if count < 0:
                raise InvariantViolated(f"block {block} was released more often than held")
            counts[block] = count
            if not count:
                if is_cached(block):
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def check(self, held: Iterable[int]) -> None:
        """Raises InvariantViolated unless `held` names each block as often as it is held, and every other block is free or cached."""
        counts = Counter(held)
        if counts != {block: count for block, count in self._counts.items() if count}:
            wrong = [block for block, count in self._counts.items() if count != counts[block]]
            raise InvariantViolated(f"blocks {wrong[:8]} are held by others than the pool believes")
        idle = [*self._free, *self._cached]
        if (
            len(idle) + len(counts) != self.num_blocks
            or len(set(idle)) != len(idle)
            or not counts.keys().isdisjoint(idle)
        ):
            raise InvariantViolated("a block of the pool is lost, or free and held at once")
