"""Hands prefix-cache blocks to a worker that asks for them by name: holds them in the pool while they are copied. Computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from workers.engine_thread import Command, HoldPrefix, ReleasePrefix
from workers.errors import Refusal, Refused
from workers.handoff.export import Export, Feed
from workers.kv_cache.block_hash import BlockKey, token_bytes
from workers.kv_transfer.messages import OpenHandoff, Prefix, PrefixDone
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.source import Filled
from workers.runner import BLOCK_SIZE
from workers.stepping.result import PrefixHeld

MAX_EXPORTS = 32
"""Prefixes handed over at once; the engine bounds their blocks, the lease their time."""


class PrefixExporter:
    """Implements workers.handoff.export.Exporter for Prefix; the engine's reports come in through `held`."""

    def __init__(self, post: Callable[[Command], None], new_export_id: Callable[[], int]) -> None:
        self._post = post
        self._new_export_id = new_export_id
        self._running: dict[int, _PrefixExport] = {}
        self.counters: Counter[str] = Counter()

    def open(self, opening: OpenHandoff, cut: Cut, feed: Feed) -> Export:
        """As Exporter.open."""
        assert isinstance(opening.subject, Prefix)
        if len(self._running) >= MAX_EXPORTS:
            self.counters["prefix_exports_refused"] += 1
            raise Refused(Refusal.QUEUE_FULL, f"{MAX_EXPORTS} prefixes are being handed over already")
        keys = keys_of(opening.subject)
        if len(keys) != opening.num_blocks:
            raise Refused(Refusal.INVALID, f"{len(keys)} blocks are named, and {opening.num_blocks} have homes")
        return _PrefixExport(self, self._new_export_id(), keys, cut, feed)

    def held(self, event: PrefixHeld) -> None:
        """The engine holds these blocks, perhaps fewer than were asked for, perhaps none."""
        export = self._running.get(event.export_id)
        if export is None:
            return
        cut, count = export.cut, len(event.blocks)
        self.counters["prefix_exported_blocks"] += count
        self.counters["prefix_exports_empty"] += not count
        if count:
            table = (0,) * cut.first_block + event.blocks
            export.feed(Filled(table, cut.first_block, cut.first_block + count, cut.layout.num_layers))
        export.feed(PrefixDone(count, count * cut.pieces_per_block))

    def _start(self, export: _PrefixExport) -> None:
        self._running[export.export_id] = export
        self._post(HoldPrefix(export.export_id, export.keys))

    def _release(self, export: _PrefixExport) -> None:
        if self._running.pop(export.export_id, None) is not None:
            self._post(ReleasePrefix(export.export_id))


class _PrefixExport:
    def __init__(self, owner: PrefixExporter, export_id: int, keys: tuple[BlockKey, ...], cut: Cut, feed: Feed) -> None:
        self._owner = owner
        self.export_id = export_id
        self.keys = keys
        self.cut = cut
        self.feed = feed

    def start(self) -> None:
        self._owner._start(self)

    def release(self, reason: str) -> None:
        self._owner._release(self)


def keys_of(subject: Prefix) -> tuple[BlockKey, ...]:
    """The blocks a receiver asks for. Raises Refused when hashes and tokens do not fit together."""
    hashes, tokens = subject.hashes, subject.token_ids
    if len(tokens) != len(hashes) * BLOCK_SIZE:
        raise Refused(Refusal.INVALID, f"{len(hashes)} blocks come with {len(tokens)} tokens")
    parents = (subject.parent, *hashes[:-1])
    starts = range(0, len(tokens), BLOCK_SIZE)
    return tuple(
        BlockKey(block_hash, parent, token_bytes(tokens[start : start + BLOCK_SIZE]))
        for block_hash, parent, start in zip(hashes, parents, starts, strict=True)
    )


def subject_of(keys: tuple[BlockKey, ...]) -> Prefix:
    """How to ask for a run of blocks."""
    tokens = tuple(token for key in keys for token in key.token_ids)
    return Prefix(tuple(key.block_hash for key in keys), tokens, keys[0].parent)
