"""What a worker hands over to others, from the moment one asks: prompts it computes, sequences it runs, prefixes it caches.

Decides what is filled when, when a sequence stands still and for how long. Knows no stream, no transport and no batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from workers.engine.messages import (
    AddSequence,
    BeginMove,
    BlocksFilled,
    BlocksFinal,
    CancelSequence,
    EndMove,
    ExportEnded,
    ExportEvent,
    Halt,
    Halted,
    HoldPrefix,
    LayersFilled,
    Prefilled,
    PrefixHeld,
    ReleasePrefix,
    Resume,
)
from workers.errors import Refusal, Refused
from workers.handoff.protocol.messages import (
    OpenHandoff,
    PrefillDone,
    PrefixDone,
    PrefixSubject,
    PromptSubject,
    RunningSubject,
    SequenceMoved,
    keys_of,
)
from workers.handoff.protocol.source_session import Filled, HandoffBroken
from workers.kv_cache.block_hash import BlockKey
from workers.kv_memory.memory import KvLayout
from workers.kv_memory.pieces import Cut
from workers.runner import BLOCK_SIZE
from workers.scheduler.sequence import Kind
from workers.serving.events import Feed, Post
from workers.serving.observer import Observer

MAX_PREFIXES = 32
"""Prefixes handed over at once; the engine bounds their blocks, the lease their time."""

Commands = list[Post | Feed]


@dataclass(slots=True)
class _Export:
    """One transfer to one receiver. `number` is how the engine knows it: a sequence, or what holds a prefix."""

    transfer: int
    number: int
    cut: Cut
    subject: PromptSubject | RunningSubject | PrefixSubject
    keys: tuple[BlockKey, ...] = ()
    num_filled: int = 0
    """Of a prompt: entries of the block table that are known to be complete."""
    num_fed: int = 0
    """Of a running sequence: pieces that have been announced, or will be by what has been said."""
    may_halt: bool = False
    """Of a running sequence: all that is final has been announced."""
    is_halting: bool = False


class Exports:
    """`find` gives the engine's id of a request that a worker of some id may take over, `new_number` a number that no sequence has.

    A sequence that is handed over stands still for at most `max_pause_s`; if its receiver has not landed by then it goes on here.
    """

    def __init__(
        self,
        layout: KvLayout,
        max_pause_s: float,
        find: Callable[[RunningSubject, str], int | None],
        new_number: Callable[[], int],
        counters: Counter[str],
        observer: Observer,
    ) -> None:
        self._layout = layout
        self._max_pause_s = max_pause_s
        self._find = find
        self._new_number = new_number
        self._counters = counters
        self._observer = observer
        self._by_transfer: dict[int, _Export] = {}
        self._by_number: dict[int, _Export] = {}
        """Those that the engine knows of."""
        self._pauses: dict[int, float] = {}
        """Sequences that stand still, with the moment at which that ends; the oldest is first."""

    def __len__(self) -> int:
        return len(self._by_transfer)

    # ---- the receiver ----

    def open(self, transfer: int, opening: OpenHandoff) -> bool:
        """Checks what can be checked at once; reserves nothing. True: it goes by how far the receiver is. Raises Refused."""
        subject = opening.subject
        match subject:
            case PromptSubject():
                export = self._open_prompt(transfer, opening, subject)
            case RunningSubject():
                export = self._open_running(transfer, opening, subject)
            case PrefixSubject():
                export = self._open_prefix(transfer, opening, subject)
        self._by_transfer[transfer] = export
        return isinstance(subject, RunningSubject)

    def _open_prompt(self, transfer: int, opening: OpenHandoff, prompt: PromptSubject) -> _Export:
        num_blocks = -(-len(prompt.request.prompt_token_ids) // BLOCK_SIZE)
        if not 0 <= opening.first_block < max(num_blocks, 1):
            raise Refused(Refusal.INVALID, "first_block is outside the prompt")
        if opening.first_block + opening.num_blocks != num_blocks:
            raise Refused(Refusal.INVALID, f"the receiver reserved other than {num_blocks} blocks for the prompt")
        return _Export(transfer, self._new_number(), self._cut(opening), prompt)

    def _open_running(self, transfer: int, opening: OpenHandoff, running: RunningSubject) -> _Export:
        name = running.request_id
        sequence_id = self._find(running, opening.target.worker_id)
        if sequence_id is None:
            raise Refused(Refusal.NOT_MOVABLE, f"no request {name} runs here")
        if sequence_id in self._by_number:
            raise Refused(Refusal.NOT_MOVABLE, f"{name} is being moved already")
        export = self._by_number[sequence_id] = _Export(transfer, sequence_id, self._cut(opening), running)
        return export

    def _open_prefix(self, transfer: int, opening: OpenHandoff, prefix: PrefixSubject) -> _Export:
        if sum(isinstance(export.subject, PrefixSubject) for export in self._by_number.values()) >= MAX_PREFIXES:
            self._counters["prefix_exports_refused"] += 1
            raise Refused(Refusal.QUEUE_FULL, f"{MAX_PREFIXES} prefixes are being handed over already")
        keys = keys_of(prefix)
        if len(keys) != opening.num_blocks:
            raise Refused(Refusal.INVALID, f"{len(keys)} blocks are named, and {opening.num_blocks} have homes")
        return _Export(transfer, self._new_number(), self._cut(opening), prefix, keys)

    def _cut(self, opening: OpenHandoff) -> Cut:
        return Cut(self._layout, opening.first_block, opening.num_blocks)

    def begin(self, transfer: int) -> Commands:
        """The receiver is connected to: the engine begins."""
        export = self._by_transfer.get(transfer)
        if export is None:
            return []
        self._by_number[export.number] = export
        match export.subject:
            case PromptSubject(request, hint):
                self._observer.prefill_begun(export.number, request.traceparent)
                return [Post(AddSequence(export.number, request, Kind.SOURCE, hint))]
            case RunningSubject():
                first = export.cut.first_block
                return [Post(BeginMove(export.number, first, first + export.cut.num_blocks))]
            case PrefixSubject():
                return [Post(HoldPrefix(export.number, export.keys))]

    def acknowledged(self, transfer: int, num_pieces: int) -> Commands:
        """So many pieces are in place there: once the receiver has all that is final, the sequence may stand still."""
        export = self._by_transfer.get(transfer)
        if export is None or not export.may_halt or num_pieces < export.num_fed or export.is_halting:
            return []
        export.is_halting = True
        return [Post(Halt(export.number))]

    def release(self, transfer: int, reason: str) -> Commands:
        """Nobody reads the blocks for it any more. `reason` is empty when the receiver has everything."""
        export = self._by_transfer.pop(transfer, None)
        if export is None:
            return []
        number, is_known = export.number, self._by_number.pop(export.number, None) is not None
        self._pauses.pop(number, None)
        match export.subject:
            case PromptSubject():
                self._observer.prefill_ended(number, reason)
                return [Post(CancelSequence(number))] if is_known else []
            case RunningSubject():
                self._counters["migrations_out" if not reason else "migrations_out_failed"] += 1
                return [Post(Resume(number) if reason else EndMove(number))]
            case PrefixSubject():
                return [Post(ReleasePrefix(number))] if is_known else []

    # ---- the engine ----

    def filled(self, event: BlocksFilled) -> Commands:
        export = self._by_number.get(event.sequence_id)
        if export is None:
            return []
        # Those before have been told of; a prompt of many chunks would else walk all of them with each.
        first, export.num_filled = export.num_filled, max(export.num_filled, event.num_filled)
        return [Feed(export.transfer, Filled(event.blocks, first, event.num_filled, self._layout.num_layers))]

    def layers_filled(self, event: LayersFilled) -> Commands:
        export = self._by_number.get(event.sequence_id)
        filled = Filled(event.blocks, event.first, event.end, event.num_layers)
        return [] if export is None else [Feed(export.transfer, filled)]

    def prefilled(self, event: Prefilled) -> Commands:
        export = self._by_number.get(event.sequence_id)
        if export is None:
            return []
        sampled = event.sampled
        assert sampled.token_id is not None
        self._observer.prefill_computed(event)
        num_pieces = export.cut.num_pieces
        done = PrefillDone(sampled.token_id, sampled.logprob, num_pieces, event.cached_tokens, event.prefill_s)
        return [Feed(export.transfer, done)]

    def failed(self, sequence_id: int, message: str) -> Commands:
        """The engine refused or failed a sequence that is no request of a router."""
        export = self._by_number.get(sequence_id)
        if export is None or not isinstance(export.subject, PromptSubject):
            return []
        return [Feed(export.transfer, HandoffBroken(message, is_ours=True))]

    def held(self, event: PrefixHeld) -> Commands:
        """The engine holds these blocks, perhaps fewer than were asked for, perhaps none."""
        export = self._by_number.get(event.export_id)
        if export is None:
            return []
        cut, count = export.cut, len(event.blocks)
        self._counters["prefix_exported_blocks"] += count
        self._counters["prefix_exports_empty"] += not count
        commands: Commands = []
        if count:
            first = cut.first_block  # as far off as the receiver likes: nothing here grows with it
            filled = Filled(event.blocks, first, first + count, cut.layout.num_layers, first)
            commands.append(Feed(export.transfer, filled))
        return [*commands, Feed(export.transfer, PrefixDone(count, count * cut.pieces_per_block))]

    def moving(self, event: ExportEvent, now: float) -> Commands:
        """What the engine says of a sequence that is being handed over."""
        export = self._by_number.get(event.sequence_id)
        if export is None:
            return []
        cut = export.cut
        match event:
            case BlocksFinal(_, blocks, first, end, is_all):
                export.may_halt = is_all
                export.num_fed = cut.pieces_before(end)
                return [Feed(export.transfer, Filled(blocks, first, end, cut.layout.num_layers))]
            case Halted(number, known, num_computed):
                num_pieces = cut.pieces_before(-(-num_computed // cut.layout.block_size))
                self._pauses[number] = now + self._max_pause_s
                return [Feed(export.transfer, SequenceMoved(known, num_computed, num_pieces))]
            case ExportEnded(_, reason):
                return [Feed(export.transfer, HandoffBroken(reason, is_ours=True))]

    # ---- time ----

    @property
    def next_due_s(self) -> float:
        """When a sequence has stood still for too long; infinity: none does."""
        return next(iter(self._pauses.values()), inf)

    def check_time(self, now: float) -> Commands:
        """Gives up what stands still for too long."""
        reason = f"it has not landed within {self._max_pause_s:g} s"
        commands: Commands = []
        while self.next_due_s <= now:
            number = next(iter(self._pauses))
            del self._pauses[number]
            commands.append(Feed(self._by_number[number].transfer, HandoffBroken(reason, is_ours=True)))
        return commands
