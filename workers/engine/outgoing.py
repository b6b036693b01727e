"""KV that other workers copy from an engine's blocks: prompts computed for them, held prefixes, and running sequences that they take over.

Knows what is filled and final, and how long it stays; not who copies it, or how."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from workers.engine.bites import Bites
from workers.engine.incoming import LOST_WITH_RANK
from workers.engine.live_sequences import Live, LiveSequences
from workers.engine.messages import BlocksFilled, BlocksFinal, ExportEnded, Halted, LayersFilled, Prefilled, PrefixHeld
from workers.errors import RankLost, Refusal, Refused
from workers.kv_cache.block_hash import BlockKey
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import layers_per_piece
from workers.request import FinishReason, Output
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled, SequenceSlice
from workers.scheduler.migration import advance_export, begin_export, resume
from workers.scheduler.sequence import Kind, Sequence, State

log = logging.getLogger(__name__)


class OutgoingKv:
    """Prompts of kind SOURCE, held until they are cancelled, and prefix blocks, held until they are released."""

    def __init__(self, sequences: LiveSequences, memory: KvMemory) -> None:
        self._sequences = sequences
        self._memory = memory
        self._kv = sequences.scheduler.kv
        self._held: dict[int, list[int]] = {}
        self._bites = Bites(memory, memory.expose)
        self.on_layers: Callable[[LayersFilled], None] | None = None
        """Hears in mid-step, on the thread that steps or one of the runner's, which layers of a SOURCE prompt are filled."""

    def layer_hook(self, batch: Batch) -> LayerHook | None:
        """None when nothing of the batch is for another worker, or nobody listens."""
        listener = self.on_layers
        lives = self._sequences.lives
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
                about = live.sequence.request.log_fields
                log.warning("a prompt computed for another worker cannot be shown to it: %s", error, extra=about)
                self._sequences.fail(live, Refusal.WORKER_LOST, LOST_WITH_RANK)
                return
            said = self._sequences.pending
            said.filled.append(BlocksFilled(sequence_id, blocks, end))
            if last is not None:
                elapsed_s = self._sequences.clock() - live.arrived_s
                said.prefilled.append(Prefilled(sequence_id, last, live.sequence.num_cached_tokens, elapsed_s))

        self._bites.add(blocks[first:end], lambda: self._sequences.lives.get(sequence_id) is live, shown)

    def hold_prefix(self, export_id: int, keys: tuple[BlockKey, ...]) -> None:
        """Holds the longest run of these blocks that the pool has, and says which; at most a quarter of the pool in all."""
        room = self._kv.num_blocks // 4 - sum(map(len, self._held.values()))
        blocks = self._held[export_id] = self._kv.hold_prefix(keys, max(0, room))

        def shown(error: RankLost | None) -> None:
            if error is not None:
                log.warning("a prefix cannot be shown to a peer: %s", error)
                self.release_prefix(export_id)
            held = self._held.get(export_id, [])
            self._sequences.pending.held.append(PrefixHeld(export_id, tuple(held)))

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


class Moves:
    """The sending end of an engine's migrations."""

    def __init__(self, sequences: LiveSequences, memory: KvMemory) -> None:
        self._sequences = sequences
        self._memory = memory
        self._moving: dict[int, tuple[Sequence, int]] = {}
        """With the number of preemptions when it began: a preempted sequence may decode again by the next look."""

    def begin(self, sequence_id: int, first_block: int, num_blocks: int) -> None:
        """As Engine.export, between two steps."""
        live = self._sequences.lives.get(sequence_id)
        try:
            if live is None:
                raise Refused(Refusal.NOT_MOVABLE, "the sequence has ended")
            begin_export(live.sequence, first_block, num_blocks, BLOCK_SIZE)
        except Refused as error:
            self._sequences.pending.exports.append(ExportEnded(sequence_id, str(error)))
        else:
            self._moving[sequence_id] = live.sequence, live.sequence.num_preemptions

    def halt(self, sequence_id: int) -> None:
        """The receiver has all that was announced: the sequence is to stand still at the next step boundary."""
        if sequence_id in self._moving:
            export = self._moving[sequence_id][0].export
            if export is not None:
                export.is_due = True

    def resume(self, sequence_id: int) -> None:
        """The migration failed: the sequence goes on here with unchanged tokens."""
        if sequence_id in self._moving:
            sequence, _ = self._moving.pop(sequence_id)
            if sequence.export is not None:
                resume(sequence)

    def end(self, sequence_id: int) -> None:
        """The receiver runs the sequence now: frees its blocks and tells the router where it left off.

        Nothing happens unless it still stands still here.
        """
        if sequence_id in self._moving and self._moving[sequence_id][0].state is State.MOVING:
            sequence, _ = self._moving.pop(sequence_id)
            name, position = sequence.request.request_id, len(sequence.known)
            moved = Output(name, position, finish_reason=FinishReason.MOVED)
            self._sequences.pending.outputs.append((sequence_id, moved))
            self._sequences.drop(self._sequences.lives[sequence_id])

    def advance(self) -> None:
        """Between two steps: says what is final, what stands still, what ended."""
        for sequence_id, (sequence, num_preemptions) in list(self._moving.items()):
            said = self._sequences.pending.exports
            ready = advance_export(sequence, BLOCK_SIZE)
            if ready is not None:
                blocks = tuple(sequence.table.blocks)
                try:
                    self._memory.expose(blocks[ready.first : ready.end])
                except RankLost as error:
                    self.resume(sequence_id)
                    said.append(ExportEnded(sequence_id, str(error)))
                    continue
                said.append(BlocksFinal(sequence_id, blocks, ready.first, ready.end, ready.is_all))
                if ready.is_last:
                    said.append(Halted(sequence_id, tuple(sequence.known), sequence.num_computed))
            elif sequence.export is None:
                del self._moving[sequence_id]
                said.append(ExportEnded(sequence_id, _why_ended(sequence, num_preemptions)))


def _why_ended(sequence: Sequence, num_preemptions: int) -> str:
    if sequence.state is State.FINISHED:
        return "the sequence has ended"
    if sequence.num_preemptions > num_preemptions:
        return "the sequence was preempted"
    return "the sequence outgrew its reserved room before it was copied"
