"""Continuous batching: decides each step's batch under one token budget; knows blocks and counts, no model and no clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from workers.errors import InvariantViolated, Refusal, Refused
from workers.kv_cache.block_pool import OutOfBlocks
from workers.kv_cache.manager import BlockTable, KvCacheManager
from workers.kv_cache.pools import PooledKvCache
from workers.runner import Batch, SequenceSlice
from workers.scheduler.pace import Pace, Room
from workers.scheduler.sequence import Effect, Kind, Sequence, State, Turn
from workers.scheduler.turns import DecodeTurns


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one engine: sequences at once, tokens a step, requests waiting, tokens small enough to prefill locally."""

    max_num_seqs: int
    max_batch_tokens: int
    max_queue: int
    local_prefill_tokens: int
    max_prefill_pause_s: float = math.inf
    """How long a step's prompts may keep those waiting that decode in it; see Pace."""
    max_decode_pause_s: float = math.inf
    """How long those that decode in a step may keep each other waiting; see DecodeTurns."""


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What one call of `schedule` decided."""

    batch: Batch
    transfers: tuple[Sequence, ...] = ()
    """Sequences whose blocks are reserved now and whose prompt another worker shall compute."""
    promotions: tuple[Sequence, ...] = ()
    """Sequences that wait from now on for lower tiers (`give_promotion_up` ends the wait) or for another worker (`pulled`)."""


@dataclass(slots=True)
class Counters:
    preemptions: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    replayed_tokens: int = 0


@dataclass(slots=True)
class Scheduler:
    """Owns all sequences of an engine. Decoding comes first, then prompts under way, then new ones, FCFS by priority."""

    kv: KvCacheManager | PooledKvCache
    limits: Limits
    keeps_outputs: bool = False
    """Blocks of outputs stay in the prefix cache: decoding writes the KV that computing a prompt writes, bit for bit."""
    waiting: list[Sequence] = field(default_factory=list)
    active: list[Sequence] = field(default_factory=list)
    """All sequences that hold blocks, in order of admission."""
    counters: Counters = field(default_factory=Counters)
    pace: Pace = field(init=False)
    turns: DecodeTurns = field(init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.limits.max_prefill_pause_s)
        self.turns = DecodeTurns(self.limits.max_decode_pause_s)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises Refused(QUEUE_FULL) at the bound."""
        if len(self.waiting) >= self.limits.max_queue:
            raise Refused(Refusal.QUEUE_FULL, f"the worker's queue of {self.limits.max_queue} requests is full", 1.0)
        self._enqueue(sequence)

    def schedule(self) -> ScheduledStep:
        """Picks the next batch and reserves what it needs; an empty batch means nothing can run."""
        decode = self._schedule_decodes(self.limits.max_batch_tokens)
        room = self.room_beside(len(decode))
        prefill: list[SequenceSlice] = []
        transfers: list[Sequence] = []
        promotions: list[Sequence] = []
        for sequence in [s for s in self.active if s.state is State.PROMOTING and _is_promoted(s)]:
            self._begin(sequence, transfers)
        for sequence in sorted((s for s in self.active if s.state is State.PREFILLING), key=lambda s: s.rank):
            self._take_chunk(sequence, room, prefill)
        transfers += self.admit(room, prefill, promotions)
        return ScheduledStep(Batch(tuple(prefill), tuple(decode)), tuple(transfers), tuple(promotions))

    def room_beside(self, num_decodes: int) -> Room:
        """What a step may take of prompts in which so many sequences decode."""
        seconds = self.pace.allowance_s if num_decodes else math.inf
        return Room(self.limits.max_batch_tokens - num_decodes, seconds, self.pace)

    def admit(self, room: Room, prefill: list[SequenceSlice], promotions: list[Sequence]) -> list[Sequence]:
        """Starts waiting sequences; those returned have their prompt computed elsewhere, those in `promotions` wait for lower
        tiers or a peer, the first chunks of the others go to `prefill`."""
        transfers: list[Sequence] = []
        self.kv.is_making_room = False
        while self.waiting and len(self.active) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            if room.is_full and not self._may_go_elsewhere(sequence):
                break  # blocks that it could not use in this step are better left to others
            if not self._admit(sequence, use_tiers=True):
                break
            self.waiting.pop(0)
            self.active.append(sequence)
            if sequence.hint is not None and sequence.kind is not Kind.TARGET:
                self.kv.plan_pull(sequence.table, sequence.hint.num_blocks)
            self.kv.promote(sequence.table)
            if not _is_promoted(sequence):
                sequence.take(Turn.PROMOTE)
                promotions.append(sequence)
                continue
            self._begin(sequence, transfers)
            if sequence.state is State.PREFILLING and not self._take_chunk(sequence, room, prefill):
                break
        return transfers

    def give_promotion_up(self, sequence: Sequence) -> None:
        """What has not come from lower tiers by now is computed."""
        promotion = sequence.table.promotion
        if promotion is not None:
            promotion.fail(promotion.num_arrived)

    def computed_prefill(self, sequence: Sequence, num_tokens: int) -> None:
        """A prefill chunk of this sequence has been computed."""
        sequence.num_computed += num_tokens
        self.counters.prefill_tokens += num_tokens
        self.kv.publish_prompt(sequence.table, sequence.num_computed)
        if sequence.num_computed == sequence.num_prompt:
            sequence.take(Turn.HOLD if sequence.kind is Kind.SOURCE else Turn.GO_ON)

    def computed_decode(self, sequence: Sequence) -> None:
        sequence.num_computed += 1
        self.counters.decode_tokens += 1

    def drew(self, sequence: Sequence, token_id: int) -> bool:
        """Records the token at the next position; True when it is new rather than replayed."""
        position = sequence.num_drawn
        sequence.num_drawn += 1
        if position < len(sequence.known):
            if sequence.known[position] != token_id:
                raise InvariantViolated(f"replay of sequence {sequence.sequence_id} changed token {position}")
            self.counters.replayed_tokens += 1
            return False
        sequence.known.append(token_id)
        return True

    def decoded_run(self, sequence: Sequence, token_ids: tuple[int, ...]) -> None:
        """As many decode steps as there are tokens, all of them new: `computed_decode` and `drew` for each."""
        self.kv.grow(sequence.table, sequence.num_computed + len(token_ids))
        sequence.num_computed += len(token_ids)
        sequence.num_drawn += len(token_ids)
        sequence.known += token_ids
        self.counters.decode_tokens += len(token_ids)

    def landed(self, sequence: Sequence, num_computed: int) -> None:
        """All blocks of a TRANSFERRING sequence have arrived and are verified; they hold `num_computed` tokens.

        Full prompt blocks were written by the prefill path wherever they come from, so they may be published.
        """
        sequence.take(Turn.LAND)
        sequence.num_computed = num_computed
        if sequence.kind is Kind.MIGRANT:
            sequence.kind = Kind.LOCAL
            self.kv.shrink(sequence.table, num_computed + 1)
        self.kv.publish_prompt(sequence.table, sequence.num_prompt)

    def admit_migrant(self, sequence: Sequence, num_tokens: int) -> None:
        """Admits a sequence past the queue, with blocks for `num_tokens`. Raises Refused(QUEUE_FULL) when there is no room."""
        if len(self.active) >= self.limits.max_num_seqs:
            raise Refused(Refusal.QUEUE_FULL, f"the worker runs {len(self.active)} sequences already", 1.0)
        if not self._admit(sequence, room=num_tokens - sequence.num_prompt):
            raise Refused(Refusal.QUEUE_FULL, "the worker's KV pool is full", 1.0)
        self.active.append(sequence)
        sequence.take(Turn.DELEGATE)

    def pulled(self, sequence: Sequence, num_blocks: int) -> None:
        """Of the blocks asked of another worker so many are in place and verified; nobody writes into them any more."""
        if sequence.table.pull is not None:
            sequence.table.pull.num_arrived = num_blocks

    def prefill_here(self, sequence: Sequence) -> None:
        """No transfer came about: the reserved blocks are computed locally."""
        self._take(sequence, Turn.FALL_BACK)

    def lose_pool(self, pool: int) -> list[Sequence]:
        """The content of a pool's blocks is gone: what ran there starts again and replays its known tokens.

        Returns the sequences that cannot: another worker reads or writes their blocks.
        """
        self.kv.forget_pool(pool)
        affected = [s for s in self.active if self.kv.pool_of(s.table) == pool]
        stuck = []
        for sequence in affected:
            if sequence.state in (State.DECODING, State.PREFILLING) and sequence.kind is not Kind.SOURCE:
                self._take(sequence, Turn.PREEMPT)
            else:
                stuck.append(sequence)
        return stuck

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence in any state and frees its blocks."""
        self._take(sequence, Turn.FINISH)
        sequence.export = None

    def end(self, sequence: Sequence) -> None:
        """Ends a sequence that a step is running; its blocks are freed by `finish` when that step is done."""
        sequence.take(Turn.END)

    def _schedule_decodes(self, budget: int) -> list[SequenceSlice]:
        chosen: dict[int, SequenceSlice] = {}
        able = sorted((s for s in self.active if s.state is State.DECODING and s.can_draw), key=lambda s: s.rank)
        decoding = self.turns.choose(able)[:budget]
        for sequence in decoding:
            while sequence.state is State.DECODING:
                try:
                    self.kv.grow(sequence.table, sequence.num_computed + 1)
                except OutOfBlocks:
                    pool = self.kv.pool_of(sequence.table)
                    victim = choose_victim(s for s in self.active if self.kv.pool_of(s.table) == pool)
                    chosen.pop(victim.sequence_id, None)
                    self._take(victim, Turn.PREEMPT)
                else:
                    chosen[sequence.sequence_id] = sequence.decode_slice()
                    break
        self.turns.give([sequence for sequence in decoding if sequence.sequence_id in chosen])
        return list(chosen.values())

    def _take_chunk(self, sequence: Sequence, room: Room, into: list[SequenceSlice]) -> bool:
        """False: nothing of it fits any more."""
        length = room.fit(sequence.num_uncomputed_prompt, sequence.num_computed)
        if length > 0 and (length < sequence.num_uncomputed_prompt or sequence.can_draw):
            room.take(length, sequence.num_computed)
            into.append(sequence.prefill_slice(length))
        return length > 0

    def _admit(self, sequence: Sequence, use_tiers: bool = False, room: int = 0) -> bool:
        """Reserves blocks for the prompt and `room` tokens, or changes nothing. With `use_tiers` what lower tiers hold is pinned there, and `_begin` or a release must follow."""
        request = sequence.request
        if sequence.prompt_blocks is None:
            use_cache = request.params.prompt_logprobs is None
            sequence.prompt_blocks = self.kv.prompt_blocks(request.prompt_token_ids, use_cache, request.cache_salt)
        # One block per decoding sequence stays free, so that an admission does not at once cause a preemption.
        spare = Counter(self.kv.pool_of(s.table) for s in self.active if s.state is State.DECODING)
        try:
            sequence.table = self.kv.reserve_prompt(sequence.prompt_blocks, use_tiers, spare, room)
        except OutOfBlocks:
            return False
        return True

    def _begin(self, sequence: Sequence, transfers: list[Sequence]) -> None:
        """All that caches give is in place: the rest of the prompt is computed, here or elsewhere."""
        self.kv.settle(sequence.table)
        sequence.num_computed = sequence.table.num_cached * self.kv.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed
            self.counters.cached_tokens += sequence.num_computed
        if self._may_go_elsewhere(sequence):
            sequence.take(Turn.DELEGATE)
            transfers.append(sequence)
        else:
            sequence.take(Turn.COMPUTE)

    def _may_go_elsewhere(self, sequence: Sequence) -> bool:
        """Whether another worker computes what is not yet computed of its prompt, or would if no cache had a part of it."""
        return (
            sequence.kind is Kind.TARGET
            and sequence.request.params.prompt_logprobs is None
            and sequence.num_uncomputed_prompt > self.limits.local_prefill_tokens
        )

    def _take(self, sequence: Sequence, turn: Turn) -> None:
        """Raises InvariantViolated, and changes nothing, when that must not happen to it."""
        match sequence.take(turn):
            case Effect.LEAVE_QUEUE:
                self.waiting.remove(sequence)
            case Effect.FREE:
                if self.keeps_outputs:
                    computed = max(0, sequence.num_computed - sequence.num_prompt)
                    self.kv.publish_output(sequence.table, sequence.known[:computed])
                self._free(sequence)
            case Effect.START_AGAIN:
                self._free(sequence)
                self._start_again(sequence)
            case Effect.STAY:
                sequence.kind = Kind.LOCAL
            case None:
                pass

    def _free(self, sequence: Sequence) -> None:
        self.active.remove(sequence)
        self.kv.release(sequence.table)

    def _start_again(self, sequence: Sequence) -> None:
        """The prompt is computed again and the known tokens are replayed. Ends a migration."""
        sequence.export = None
        sequence.table = BlockTable()
        sequence.num_computed = sequence.num_drawn = 0
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        if sequence.kind is Kind.TARGET:
            sequence.kind = Kind.LOCAL
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.rank)


def _is_promoted(sequence: Sequence) -> bool:
    """Nothing is on its way from lower tiers or other workers."""
    table = sequence.table
    is_pulled = table.pull is None or table.pull.num_arrived is not None
    return is_pulled and (table.promotion is None or table.promotion.is_done)


def choose_victim(active: Iterable[Sequence]) -> Sequence:
    """The last in order of service among those whose blocks no other worker must read or write.

    One that is being copied to another worker comes only when there is no other: its migration ends with it, and leaving
    is what frees blocks soonest. There always is one: the sequence that asked for a block is itself a candidate.
    """
    candidates = [s for s in active if s.state in (State.DECODING, State.PREFILLING) and s.kind is not Kind.SOURCE]
    if not candidates:
        raise InvariantViolated("preemption was asked for while nothing can be preempted")
    return max(candidates, key=lambda s: (s.export is None, s.rank))
