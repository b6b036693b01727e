"""KV that other workers write into an engine's blocks: prompts computed elsewhere, sequences that move here, prefixes pulled from peers.

Knows what is reserved, wanted and in place; not how bytes travel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from workers.engine.bites import Bites
from workers.engine.live_sequences import Live, LiveSequences
from workers.engine.messages import PullWanted, TransferWanted
from workers.errors import RankLost, Refusal, Refused
from workers.kv_memory.memory import KvMemory
from workers.kv_tiers.tiers import KvTiers
from workers.request import HandoffReport, Request, error_output
from workers.runner import Sampled
from workers.scheduler.migration import land_migrant, reserve_migrant
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Kind, State
from workers.scheduler.sequence import Sequence as Running

TIMEOUT_S = 5.0
"""A sequence waits so long for the next block from a slow disk, then computes what has not come."""


class Promotions:
    """Without tiers there is nothing to wait for, and every call returns at once."""

    def __init__(self, tiers: KvTiers | None, scheduler: Scheduler) -> None:
        self._tiers = tiers
        self._scheduler = scheduler
        self._waiting: list[tuple[Running, float, int]] = []
        """With the time at which its wait ends unless more blocks have arrived than so many."""

    def begin(self, sequence: Running, now: float) -> None:
        """The sequence waits from now on."""
        if self._tiers is not None:
            self._waiting.append((sequence, now + TIMEOUT_S, 0))

    def poll(self, now: float) -> None:
        """Before each step: takes over what has come, and ends waits that took too long."""
        if self._tiers is None:
            return
        self._tiers.poll()
        waiting = self._waiting
        self._waiting = []
        for sequence, by_s, num_before in waiting:
            if sequence.state is not State.PROMOTING:
                continue
            promotion = sequence.table.promotion
            num_now = 0 if promotion is None else promotion.num_arrived
            if num_now > num_before:
                by_s = now + TIMEOUT_S
            elif now >= by_s:
                self._scheduler.give_promotion_up(sequence)
            self._waiting.append((sequence, by_s, num_now))

    @property
    def is_copying(self) -> bool:
        """The next `poll` copies more."""
        return self._tiers is not None and self._tiers.is_copying

    def on_ready(self, notify: Callable[[], None]) -> None:
        """`notify` is called, on another thread, when `poll` would find something new."""
        if self._tiers is not None:
            self._tiers.on_result(notify)

    def wait(self, timeout_s: float) -> None:
        """Returns when `poll` would find something new, or nothing is on its way, or after so long."""
        if self._tiers is not None:
            self._tiers.wait(timeout_s)

    def counters(self) -> tuple[tuple[str, float], ...]:
        return () if self._tiers is None else self._tiers.counters()

    def close(self) -> None:
        if self._tiers is not None:
            self._tiers.close()


log = logging.getLogger(__name__)

LOST_WITH_RANK = "the rank that held this prompt was lost"


class IncomingKv:
    """Blocks that others write into stay reserved until they have stopped, whatever becomes of the sequence."""

    def __init__(self, sequences: LiveSequences, memory: KvMemory) -> None:
        self._sequences = sequences
        self._scheduler = sequences.scheduler
        self._bites = Bites(memory, memory.adopt)
        self._adoptions: dict[int, int] = {}
        """Of sequences whose blocks have come and are not all the model's yet: their numbers among the bites."""

    # ---- prompts that another worker computes ----

    def want(self, sequence: Running) -> None:
        """Its blocks are reserved: another worker shall fill those that no cache filled."""
        table = sequence.table
        wanted = TransferWanted(sequence.sequence_id, table.num_cached, tuple(table.blocks), sequence.hint)
        self._sequences.pending.transfers.append(wanted)

    def landed(self, sequence_id: int, sampled: Sampled, cached_tokens: int, report: HandoffReport) -> None:
        """The prompt's blocks are in place and verified; `sampled` is the first token."""
        live = self._transferring(sequence_id)
        if live is None:
            return
        assert sampled.token_id is not None
        if not self._sequences.knows((sampled.token_id,)) or not 0 <= cached_tokens <= live.sequence.num_prompt:
            self.failed(sequence_id, report)
            return

        def decode(has_blocks: bool) -> None:
            if live.has_lost_blocks or not has_blocks:
                self.failed(sequence_id, report)
                return
            assert live.answer is not None
            live.answer.landed(report, cached_tokens)
            sequence = live.sequence
            self._scheduler.landed(sequence, sequence.num_prompt)
            self._sequences.drew(live, Sampled(sequence_id, sequence.known[0]) if sequence.known else sampled)

        table = live.sequence.table
        self._adopt(live, [] if live.has_lost_blocks else table.blocks[table.num_cached :], decode)

    def failed(self, sequence_id: int, report: HandoffReport) -> None:
        """No worker could compute the prompt for us, or move the sequence here; nothing writes into the reserved blocks any more."""
        live = self._transferring(sequence_id)
        if live is None:
            return
        if live.sequence.kind is Kind.MIGRANT:
            self._sequences.fail(live, Refusal.NOT_MOVABLE, "it could not be moved here")
            return
        assert live.answer is not None
        live.answer.computed_here(report, self._sequences.clock())
        if live.has_lost_blocks:
            table = live.sequence.table
            live.sequence.num_computed = table.num_cached = table.num_published = 0
        self._scheduler.prefill_here(live.sequence)

    # ---- sequences that move here ----

    def add_migrant(self, sequence_id: int, request: Request) -> None:
        """Reserves room for a sequence that another worker runs, and asks for its blocks with TransferWanted.

        `request.replay_token_ids` are what the client has of it. Raises InvalidRequest, or Refused(QUEUE_FULL): it never waits.
        """
        live = self._sequences.arrive(sequence_id, request, Kind.MIGRANT)
        reserve_migrant(self._scheduler, live.sequence, self._sequences.longest(request))
        self._sequences.lives[sequence_id] = live
        assert live.answer is not None
        live.answer.continue_from(request.replay_token_ids)
        self.want(live.sequence)

    def moved_in(self, sequence_id: int, known_token_ids: tuple[int, ...], num_computed: int) -> None:
        """A migrant's blocks are in place and verified, with its state: it goes on here where it stood."""
        live = self._transferring(sequence_id)
        if live is None:
            return
        table = live.sequence.table
        if not self._sequences.knows(known_token_ids):
            self._sequences.fail(live, Refusal.NOT_MOVABLE, "the state that came has token ids outside the vocabulary")
            return
        room = len(table.blocks) * self._scheduler.kv.block_size
        if len(known_token_ids) > live.sequence.max_output_tokens or not 0 <= num_computed <= room:
            self._sequences.fail(live, Refusal.NOT_MOVABLE, "the state that came is longer than the request may be")
            return

        def go_on(has_blocks: bool) -> None:
            if live.has_lost_blocks or not has_blocks:
                self._sequences.fail(live, Refusal.WORKER_LOST, LOST_WITH_RANK)
                return
            try:
                land_migrant(self._scheduler, live.sequence, known_token_ids, num_computed)
            except Refused as error:
                self._sequences.fail(live, error.refusal, str(error))
                return
            assert live.answer is not None
            live.answer.continue_from(known_token_ids)
            self._sequences.constrain(live.sequence)

        self._adopt(live, table.blocks[table.num_cached : self._scheduler.kv.blocks_for(num_computed)], go_on)

    # ---- prefixes of peers ----

    def pull(self, sequence: Running, prefill_tokens_per_s: float) -> None:
        """Its blocks are reserved: asks the peer that may have the beginning of its prompt, if there is one."""
        pull, hint = sequence.table.pull, sequence.hint
        if pull is not None and hint is not None:
            blocks = tuple(sequence.table.blocks[: pull.first_block + len(pull.keys)])
            wanted = PullWanted(
                sequence.sequence_id, hint.peer, pull.first_block, blocks, pull.keys, prefill_tokens_per_s
            )
            self._sequences.pending.pulls.append(wanted)

    def pulled(self, sequence_id: int, num_blocks: int) -> None:
        """Another worker has sent the first `num_blocks` of the blocks asked for; nothing writes into any of them any more."""
        live = self._sequences.lives.get(sequence_id)
        pull = live.sequence.table.pull if live is not None else None
        if live is None or pull is None or pull.num_arrived is not None:
            return
        if live.is_cancelled:
            self._scheduler.pulled(live.sequence, num_blocks)
            self._sequences.drop(live)
            return
        blocks = live.sequence.table.blocks[pull.first_block : pull.first_block + num_blocks]
        self._adopt(
            live, blocks, lambda has_blocks: self._scheduler.pulled(live.sequence, num_blocks if has_blocks else 0)
        )

    # ---- from the memory that others write into to where the model reads ----

    @property
    def is_adopting(self) -> bool:
        """Blocks wait for the next bite."""
        return self._bites.is_busy

    def advance(self) -> None:
        """Once a step: lets the model have a bite of what has come, first come first served."""
        self._bites.advance()

    def _adopt(self, live: Live, blocks: Sequence[int], then: Callable[[bool], None]) -> None:
        """`then` hears, now or in a later step, whether the model has the blocks."""
        sequence_id = live.sequence.sequence_id

        def adopted(error: RankLost | None) -> None:
            self._adoptions.pop(sequence_id, None)
            if error is not None:
                about = live.sequence.request.log_fields
                log.warning("what came for sequence %d is of no use: %s", sequence_id, error, extra=about)
            then(error is None)

        number = self._bites.add(blocks, lambda: self._sequences.lives.get(sequence_id) is live, adopted)
        if self._bites.waits(number):
            self._adoptions[sequence_id] = number

    # ---- ends ----

    def cancel(self, live: Live) -> bool:
        """Whether others write into its blocks: then it ends when they have stopped, and they are asked to."""
        number = self._adoptions.pop(live.sequence.sequence_id, None)
        if number is not None:
            self._bites.drop(number)
            return False  # they have stopped already
        if live.sequence.state is not State.TRANSFERRING and not _is_pulling(live.sequence):
            return False
        if not live.is_cancelled:
            live.is_cancelled = True
            self._sequences.pending.abandoned.append(live.sequence.sequence_id)
        return True

    def lose(self, sequence: Running) -> None:
        """A pool lost what these blocks held. A transfer under way is let finish, and its prompt computed here."""
        live = self._sequences.lives.get(sequence.sequence_id)
        if live is None:  # it has ended, and only a step that still runs keeps it
            return
        if sequence.state is State.TRANSFERRING:
            live.has_lost_blocks = True
        elif _is_pulling(sequence):
            output = error_output(sequence.request, Refusal.WORKER_LOST, LOST_WITH_RANK)
            self._sequences.pending.outputs.append((sequence.sequence_id, output))
            if not self.cancel(live):
                self._sequences.drop(live)
        else:
            self._sequences.fail(live, Refusal.WORKER_LOST, LOST_WITH_RANK)

    def _transferring(self, sequence_id: int) -> Live | None:
        """The sequence whose transfer has ended; None when nobody waits for it, or not any more."""
        live = self._sequences.lives.get(sequence_id)
        if live is None or live.sequence.state is not State.TRANSFERRING:
            return None
        if live.is_cancelled:
            self._sequences.drop(live)
            return None
        return live


def _is_pulling(sequence: Running) -> bool:
    return sequence.table.pull is not None and sequence.table.pull.num_arrived is None
