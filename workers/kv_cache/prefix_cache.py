"""Finds the KV blocks of a prompt's beginning that are in the pool already; knows block ids and hashes, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.status import KvEvent

MAX_PENDING_CHANGES = 65_536
"""Changes kept between two frames; beyond that the next event is a full dump."""


@dataclass(frozen=True, slots=True)
class _Entry:
    block: int
    parent: int
    token_ids: tuple[int, ...]


class PrefixCache:
    """Maps chained block hashes (workers.kv_cache.block_hash) to blocks whose bits the prefill path wrote.

    A hash alone is not believed: the entry's tokens and its parent must match too, so a collision is a miss.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[int, _Entry] = {}
        self._hash_of_block: dict[int, int] = {}
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._overflow = False
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, hashes: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """Blocks for the longest cached run of the prompt's full blocks, in order."""
        blocks: list[int] = []
        parent = 0
        size = self._block_size
        for index, block_hash in enumerate(hashes):
            entry = self._entries.get(block_hash)
            if entry is None or entry.parent != parent:
                break
            if entry.token_ids != tuple(token_ids[index * size : (index + 1) * size]):
                break
            blocks.append(entry.block)
            parent = block_hash
        return blocks

    def publish(self, block: int, block_hash: int, parent: int, token_ids: tuple[int, ...]) -> None:
        """Makes a full, finished prompt block findable. The first block of a hash stays; a later twin is ignored."""
        if block_hash in self._entries or block in self._hash_of_block:
            return
        self._entries[block_hash] = _Entry(block, parent, token_ids)
        self._hash_of_block[block] = block_hash
        self._removed.pop(block_hash, None)
        self._note(self._stored, block_hash)

    def contains(self, block: int) -> bool:
        return block in self._hash_of_block

    def forget(self, block: int) -> None:
        """The pool evicted this block."""
        block_hash = self._hash_of_block.pop(block)
        del self._entries[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._note(self._removed, block_hash)

    def clear(self) -> None:
        """No block holds what it held."""
        for block in list(self._hash_of_block):
            self.forget(block)

    def take_event(self) -> KvEvent | None:
        """What changed since the last call, numbered; None when nothing did."""
        if self._overflow:
            return self.dump()
        if not self._stored and not self._removed:
            return None
        self._sequence += 1
        event = KvEvent(self._sequence, tuple(self._stored), tuple(self._removed))
        self._stored, self._removed = {}, {}
        return event

    def dump(self) -> KvEvent:
        """The full set of cached hashes, numbered so that the next change follows it."""
        self._stored, self._removed, self._overflow = {}, {}, False
        self._sequence += 1
        return KvEvent(self._sequence, tuple(self._entries), (), reset=True)

    def _note(self, changes: dict[int, None], block_hash: int) -> None:
        changes[block_hash] = None
        if len(changes) > MAX_PENDING_CHANGES:
            self._overflow = True
            changes.clear()
