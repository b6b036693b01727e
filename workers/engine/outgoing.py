"""KV that other workers copy from an engine's blocks while nobody changes it: prompts computed for them, and held prefixes.

Knows what is filled and how long it stays; not who copies it, or how. Sequences that move away: workers.engine.moves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from workers.engine.bites import Bites
from workers.engine.incoming import LOST_WITH_RANK
from workers.engine.live_sequences import Live, Roster
from workers.engine.results import BlocksFilled, LayersFilled, Prefilled, PrefixHeld
from workers.errors import RankLost, Refusal
from workers.kv_cache.block_hash import BlockKey
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import layers_per_piece
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled, SequenceSlice
from workers.scheduler.sequence import Kind

log = logging.getLogger(__name__)


class Outgoing:
    """Prompts of kind SOURCE, held until they are cancelled, and prefix blocks, held until they are released."""

    def __init__(self, roster: Roster, memory: KvMemory) -> None:
        self._roster = roster
        self._memory = memory
        self._kv = roster.scheduler.kv
        self._held: dict[int, list[int]] = {}
        self._bites = Bites(memory, memory.expose)
        self.on_layers: Callable[[LayersFilled], None] | None = None
        """Hears in mid-step, on the thread that steps or one of the runner's, which layers of a SOURCE prompt are filled."""

    def layer_hook(self, batch: Batch) -> LayerHook | None:
        """None when nothing of the batch is for another worker, or nobody listens."""
        listener = self.on_layers
        lives = self._roster.lives
        sources = [s for s in batch.prefill if lives[s.sequence_id].sequence.kind is Kind.SOURCE]
        layout = self._memory.layout
        every = layers_per_piece(layout)
        if listener is None or not sources or every >= layout.num_layers:
            return None
        fills: list[LayersFilled] = []
        for piece in sources:
            table, end = lives[piece.sequence_id].sequence.table, piece.start + len(piece.token_ids)
            first, blocks = piece.start // BLOCK_SIZE, tuple(table.blocks)
            # Where the prompt ends its last block is as full as it will be.
            last = len(blocks) if piece.sample is not None else end // BLOCK_SIZE
            fills.append(LayersFilled(piece.sequence_id, blocks, first, last, 0))

        def tell(num_layers: int) -> None:
            for fill in fills:
                listener(replace(fill, num_layers=num_layers))

        return LayerHook(every, tell, tuple(b for fill in fills for b in fill.blocks[fill.first : fill.end]))

    def computed(self, live: Live, piece: SequenceSlice, sampled: Sampled) -> None:
        """A chunk of a SOURCE prompt has been computed: says what is filled, and with the last one that all is."""
        sequence = live.sequence
        done = sampled.token_id is not None
        blocks = tuple(sequence.table.blocks)
        num_filled = len(blocks) if done else sequence.num_computed // BLOCK_SIZE
        is_first = piece.start <= sequence.table.num_cached * BLOCK_SIZE  # cached blocks were never shown to a transfer
        first = 0 if is_first else piece.start // BLOCK_SIZE
        ends = [*range(first, num_filled, self._memory.blocks_per_bite), num_filled][1:] or [num_filled]
        for start, end in zip([first, *ends], ends, strict=False):
            self._show(live, blocks, start, end, sampled if done and end == num_filled else None)

    def _show(self, live: Live, blocks: tuple[int, ...], first: int, end: int, last: Sampled | None) -> None:
        """Shows entries first .. end-1 of a block table to whoever copies them, now or in a later step; `last`: the first token."""
        sequence_id = live.sequence.sequence_id

        def shown(error: RankLost | None) -> None:
            if error is not None:
                log.warning("a prompt computed for another worker cannot be shown to it: %s", error)
                self._roster.fail(live, Refusal.WORKER_LOST, LOST_WITH_RANK)
                return
            said = self._roster.said
            said.filled.append(BlocksFilled(sequence_id, blocks, end))
            if last is not None:
                elapsed_s = self._roster.clock() - live.arrived_s
                said.prefilled.append(Prefilled(sequence_id, last, live.sequence.num_cached_tokens, elapsed_s))

        self._bites.add(blocks[first:end], lambda: self._roster.lives.get(sequence_id) is live, shown)

    def hold_prefix(self, export_id: int, keys: tuple[BlockKey, ...]) -> None:
        """Holds the longest run of these blocks that the pool has, and says which; at most a quarter of the pool in all."""
        room = self._kv.num_blocks // 4 - sum(map(len, self._held.values()))
        blocks = self._held[export_id] = self._kv.hold_prefix(keys, max(0, room))

        def shown(error: RankLost | None) -> None:
            if error is not None:
                log.warning("a prefix cannot be shown to a peer: %s", error)
                self.release_prefix(export_id)
            held = self._held.get(export_id, [])
            self._roster.said.held.append(PrefixHeld(export_id, tuple(held)))

        self._bites.add(blocks, lambda: self._held.get(export_id) is blocks, shown)

    @property
    def held_prefixes(self) -> list[list[int]]:
        """Blocks that are held for peers."""
        return list(self._held.values())

    @property
    def is_showing(self) -> bool:
        """Blocks wait for the next bite."""
        return self._bites.is_busy

    def advance(self) -> None:
        """Once a step: shows a bite of what is to be shown, first come first served."""
        self._bites.advance()

    def release_prefix(self, export_id: int) -> None:
        self._kv.release_blocks(self._held.pop(export_id, []))
