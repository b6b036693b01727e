"""Running sequences that other workers take over: what of each is final, when it stands still, what became of it. Knows no network."""

from __future__ import annotations

from workers.engine.live_sequences import Roster
from workers.engine.results import BlocksFinal, ExportEnded, Halted
from workers.errors import RankLost, Refusal, Refused
from workers.kv_memory.memory import KvMemory
from workers.request import FinishReason, Output
from workers.runner import BLOCK_SIZE
from workers.scheduler.migration import advance_export, begin_export, resume
from workers.scheduler.sequence import Sequence, State


class Moves:
    """The sending end of an engine's migrations."""

    def __init__(self, roster: Roster, memory: KvMemory) -> None:
        self._roster = roster
        self._memory = memory
        self._moving: dict[int, tuple[Sequence, int]] = {}
        """With the number of preemptions when it began: a preempted sequence may decode again by the next look."""

    def begin(self, sequence_id: int, first_block: int, num_blocks: int) -> None:
        """As Engine.export, between two steps."""
        live = self._roster.lives.get(sequence_id)
        try:
            if live is None:
                raise Refused(Refusal.NOT_MOVABLE, "the sequence has ended")
            begin_export(live.sequence, first_block, num_blocks, BLOCK_SIZE)
        except Refused as error:
            self._roster.said.exports.append(ExportEnded(sequence_id, str(error)))
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

    def depart(self, sequence_id: int) -> None:
        """The receiver runs the sequence now: frees its blocks and tells the router where it left off.

        Nothing happens unless it still stands still here.
        """
        if sequence_id in self._moving and self._moving[sequence_id][0].state is State.MOVING:
            sequence, _ = self._moving.pop(sequence_id)
            name, position = sequence.request.request_id, len(sequence.known)
            moved = Output(name, position, finish_reason=FinishReason.MOVED)
            self._roster.said.outputs.append((sequence_id, moved))
            self._roster.drop(self._roster.lives[sequence_id])

    def advance(self) -> None:
        """Between two steps: says what is final, what stands still, what ended."""
        for sequence_id, (sequence, num_preemptions) in list(self._moving.items()):
            said = self._roster.said.exports
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
