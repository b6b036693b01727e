"""An engine's side of migrations: keeps the running sequences that other workers copy, and says what became of each. Knows no network."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.kv_transfer.memory import KvMemory
from workers.runner import BLOCK_SIZE
from workers.scheduler.migration import advance_export, begin_export, resume
from workers.scheduler.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class BlocksFinal:
    """Entries first .. end-1 of the block table of a sequence that is being moved will not change any more."""

    sequence_id: int
    blocks: tuple[int, ...]
    first: int
    end: int
    is_all: bool
    """Nothing else is final yet."""


@dataclass(frozen=True, slots=True)
class Halted:
    """A sequence stands still for its migration, all of its blocks are final; `num_computed` tokens are in them."""

    sequence_id: int
    known_token_ids: tuple[int, ...]
    num_computed: int


@dataclass(frozen=True, slots=True)
class ExportEnded:
    """A sequence that was being moved will not be, because of something that happened here."""

    sequence_id: int
    reason: str


ExportEvent = BlocksFinal | Halted | ExportEnded


@dataclass(slots=True)
class Exports:
    """The sequences of one engine that are being copied away. `ended` are refusals that wait to be told."""

    memory: KvMemory
    sequences: dict[int, tuple[Sequence, int]] = field(default_factory=dict)
    """With the number of preemptions when the export began: a preempted sequence may decode again by the next look."""
    ended: list[ExportEnded] = field(default_factory=list)

    def begin(self, sequence: Sequence, first_block: int, num_blocks: int) -> None:
        """Raises Refused."""
        begin_export(sequence, first_block, num_blocks, BLOCK_SIZE)
        self.sequences[sequence.sequence_id] = sequence, sequence.num_preemptions

    def halt(self, sequence_id: int) -> None:
        """The receiver has all that was announced: let the sequence stand still at the next step boundary."""
        if sequence_id in self.sequences:
            export = self.sequences[sequence_id][0].export
            if export is not None:
                export.is_due = True

    def resume(self, sequence_id: int) -> None:
        """The migration failed: the sequence goes on here."""
        if sequence_id in self.sequences:
            sequence, _ = self.sequences.pop(sequence_id)
            if sequence.export is not None:
                resume(sequence)

    def depart(self, sequence_id: int) -> Sequence | None:
        """The receiver has landed. Returns the sequence if it still stands still here, and forgets it."""
        if sequence_id not in self.sequences or self.sequences[sequence_id][0].state is not State.MOVING:
            return None
        return self.sequences.pop(sequence_id)[0]

    def advance(self) -> list[ExportEvent]:
        """Between two steps: what is final, what stands still, what ended."""
        events: list[ExportEvent] = [*self.ended]
        self.ended.clear()
        for sequence_id, (sequence, num_preemptions) in list(self.sequences.items()):
            ready = advance_export(sequence, BLOCK_SIZE)
            if ready is not None:
                blocks = tuple(sequence.table.blocks)
                self.memory.expose(blocks[ready.first : ready.end])
                events.append(BlocksFinal(sequence_id, blocks, ready.first, ready.end, ready.is_all))
                if ready.is_last:
                    events.append(Halted(sequence_id, tuple(sequence.known), sequence.num_computed))
            elif sequence.export is None:
                del self.sequences[sequence_id]
                events.append(ExportEnded(sequence_id, _why_ended(sequence, num_preemptions)))
        return events


def _why_ended(sequence: Sequence, num_preemptions: int) -> str:
    if sequence.state is State.FINISHED:
        return "the sequence has ended"
    if sequence.num_preemptions > num_preemptions:
        return "the sequence was preempted"
    return "the sequence outgrew its reserved room before it was copied"
