"""The step loop: schedule, run, sample, advance. Used by a worker's engine thread and directly by the offline LLM; knows no network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from workers.errors import InvalidRequest, PoolsLost, RankLost, Refusal, Refused
from workers.kv_cache.manager import KvCacheManager
from workers.kv_cache.pools import PooledKvCache
from workers.kv_cache.prefix_cache import BlockKey
from workers.kv_tiers.tiers import KvTiers
from workers.kv_transfer.pieces import layers_per_piece
from workers.launching import LaunchingRunner
from workers.moves import ExportEnded, ExportEvent, Exports
from workers.request import FinishReason, HandoffReport, Output, Request, TokenLogprob
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Runner, Sampled, SequenceSlice
from workers.sampling.output import Detokenizer, OutputState
from workers.scheduler.ahead import schedule_ahead
from workers.scheduler.migration import land_migrant, reserve_migrant
from workers.scheduler.scheduler import Limits, Scheduler, Step
from workers.scheduler.sequence import Kind, Sequence, State
from workers.status import KvEvent, Load, PrefixHint, WorkerAddress

log = logging.getLogger(__name__)

LOST_WITH_RANK = "the rank that held this prompt was lost"
_WAITS_FOR_OTHERS = (State.PROMOTING, State.TRANSFERRING, State.MOVING, State.HELD)

PROMOTION_TIMEOUT_S = 5.0
"""A sequence waits so long for a slow disk, then computes what has not come."""


@dataclass(frozen=True, slots=True)
class TransferWanted:
    """Blocks are reserved: another worker shall fill `blocks`; those before `first_block` hold the prefix already."""

    sequence_id: int
    first_block: int
    blocks: tuple[int, ...]
    hint: PrefixHint | None = None
    """Where the prefill worker can have the beginning of the prompt."""


@dataclass(frozen=True, slots=True)
class PullWanted:
    """Blocks are reserved: the peer shall fill `blocks` from number `first_block` on with what `keys` name."""

    sequence_id: int
    peer: WorkerAddress
    first_block: int
    blocks: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    prefill_tokens_per_s: float
    """How fast we would compute them instead, measured; 0: not measured yet."""


@dataclass(frozen=True, slots=True)
class PrefixHeld:
    """These blocks hold the beginning of what `hold_prefix` asked for, until `release_prefix`."""

    export_id: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksFilled:
    """A prompt computed for another worker has its first `num_filled` blocks complete."""

    sequence_id: int
    blocks: tuple[int, ...]
    num_filled: int


@dataclass(frozen=True, slots=True)
class LayersFilled:
    """In mid-step: of a prompt computed for another worker, entries first .. end-1 of its block table hold the KV of their
    first `num_layers` layers."""

    sequence_id: int
    blocks: tuple[int, ...]
    first: int
    end: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt computed for another worker is done; its blocks are held until `cancel`."""

    sequence_id: int
    sampled: Sampled
    cached_tokens: int
    prefill_s: float


@dataclass(slots=True)
class StepResult:
    """Everything one step produced, keyed by the caller's sequence ids."""

    outputs: list[tuple[int, Output]] = field(default_factory=list)
    transfers: list[TransferWanted] = field(default_factory=list)
    filled: list[BlocksFilled] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    exports: list[ExportEvent] = field(default_factory=list)
    """Of sequences that other workers take over."""
    abandoned: list[int] = field(default_factory=list)
    """Sequences that were cancelled while another worker's bytes were on their way: their blocks stay reserved until
    `transfer_failed` or `pulled` confirms that nothing writes into them any more."""
    pulls: list[PullWanted] = field(default_factory=list)
    held: list[PrefixHeld] = field(default_factory=list)
    kv_event: KvEvent | None = None


@dataclass(slots=True, eq=False)
class _Live:
    sequence: Sequence
    output: OutputState | None
    started_s: float
    report: HandoffReport | None = None
    extra_cached: int = 0
    queue_s: float | None = None
    """From its arrival until it had blocks."""
    computed_from_s: float | None = None
    """When this worker began to compute a prompt that did not come from elsewhere."""
    is_cancelled: bool = False
    has_lost_blocks: bool = False
    """Its blocks lost what they held while another worker wrote into them."""
    has_spoken: bool = False
    num_running: int = 0
    """Steps launched with it and not finished: until there is none, its blocks belong to nobody else."""
    num_texted: int = 0
    """Tokens that `output` has seen; a replay after a preemption does not show them again."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    promoted_by_s: float = 0.0
    """When waiting for lower tiers ends."""


@dataclass(slots=True, eq=False)
class _Running:
    """A step from its launch to its results; `launched` is the runner's handle, where it launches at all."""

    batch: Batch
    lives: list[_Live]
    """In the order of the results: prefill, then decode."""
    launched: Any = None


class Engine:
    """Runs sequences on one Runner. One thread owns it.

    `make_detokenizer(request)` gives a fresh Detokenizer. `max_model_len` bounds prompt + output in tokens. With
    `overlap_steps`, a runner that can launch (workers.launching) computes a step while the next one is scheduled.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        *,
        make_detokenizer: Callable[[Request], Detokenizer],
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        prefix_cache: bool = True,
        tiers: KvTiers | None = None,
        worker_id: str = "local",
        overlap_steps: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._launcher = runner if overlap_steps and isinstance(runner, LaunchingRunner) else None
        self._running: _Running | None = None
        self._make_detokenizer = make_detokenizer
        self._eos = eos_token_ids
        self._max_model_len = max_model_len
        self._worker_id = worker_id
        self._clock = clock
        num_pools, num_blocks = runner.num_pools, runner.kv_memory.layout.num_blocks
        self._kv = (
            KvCacheManager(num_blocks, BLOCK_SIZE, prefix_cache, tiers)
            if num_pools == 1
            else PooledKvCache(num_pools, num_blocks // num_pools, BLOCK_SIZE, prefix_cache)
        )
        self._tiers = tiers
        self._scheduler = Scheduler(self._kv, limits)
        self._live: dict[int, _Live] = {}
        self._arrivals = 0
        self.on_layers: Callable[[LayersFilled], None] | None = None
        """Hears in mid-step, on the thread that steps or one of the runner's, which layers of a SOURCE prompt are filled."""
        self._abandoned: list[int] = []
        self._early: list[tuple[int, Output]] = []
        self._settled = StepResult()
        self._early_transfers: list[TransferWanted] = []
        self._exports = Exports(runner.kv_memory)
        self._held_prefixes: dict[int, list[int]] = {}
        """Blocks held for other workers to copy."""
        self.last_step_s = 0.0
        self.prefill_tokens_per_s: float | None = None
        """Of recent steps with prompts, smoothed."""
        self.made_no_progress = False
        """The last step computed nothing: every sequence waits for blocks or for another worker."""

    def check(self, request: Request) -> None:
        """Raises InvalidRequest when this engine can never serve the request."""
        request.params.validate(self._runner.vocab_size)
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty", "prompt")
        if not all(0 <= token < self._runner.vocab_size for token in request.prompt_token_ids):
            raise InvalidRequest(f"the prompt has token ids outside 0..{self._runner.vocab_size - 1}", "prompt")
        if num_prompt >= self._max_model_len:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens and the context holds {self._max_model_len} with the output",
                "prompt",
            )
        longest = min(num_prompt + request.params.max_tokens, self._max_model_len)
        if self._kv.blocks_for(longest) > self._kv.max_sequence_blocks:
            raise InvalidRequest(
                f"prompt and output of {longest} tokens need {self._kv.blocks_for(longest)} KV blocks, "
                f"the pool has {self._kv.max_sequence_blocks}: lower max_tokens or raise worker.kv_memory_bytes",
                "max_tokens",
            )

    def add(self, sequence_id: int, request: Request, kind: Kind = Kind.LOCAL, hint: PrefixHint | None = None) -> None:
        """Queues a request under the caller's id. Raises InvalidRequest or Refused(QUEUE_FULL)."""
        self.check(request)
        live = self._make_live(sequence_id, request, kind, hint)
        self._scheduler.add(live.sequence)
        self._live[sequence_id] = live

    def _make_live(self, sequence_id: int, request: Request, kind: Kind, hint: PrefixHint | None = None) -> _Live:
        output = None
        if kind is not Kind.SOURCE:
            eos = frozenset(self._eos)
            output = OutputState(request, self._make_detokenizer(request), eos, self._max_model_len)
        self._arrivals += 1
        sequence = Sequence(
            sequence_id=sequence_id,
            request=request,
            kind=kind,
            arrival=self._arrivals,
            suppressed_token_ids=(*self._eos, *request.params.stop_token_ids),
            known=list(request.replay_token_ids),
            max_output_tokens=min(request.params.max_tokens, self._max_model_len - len(request.prompt_token_ids)),
            hint=hint if hint is not None and hint.peer.worker_id != self._worker_id else None,
        )
        return _Live(sequence, output, self._clock())

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence without further output and frees what it holds; unknown ids are ignored.

        Also releases a finished prefill that another worker has taken.
        """
        live = self._live.get(sequence_id)
        if live is None:
            return
        pull = live.sequence.table.pull
        if live.sequence.state is State.TRANSFERRING or (pull is not None and pull.num_arrived is None):
            if not live.is_cancelled:
                live.is_cancelled = True
                self._abandoned.append(sequence_id)
            return
        self._drop(live)

    def landed(self, sequence_id: int, sampled: Sampled, cached_tokens: int, report: HandoffReport) -> None:
        """The prompt's blocks are in place and verified; `sampled` is the first token."""
        live = self._live.get(sequence_id)
        if live is None or live.sequence.state is not State.TRANSFERRING:
            return
        if live.is_cancelled:
            self._drop(live)
            return
        if live.has_lost_blocks:
            self.transfer_failed(sequence_id, report)
            return
        live.report = report
        live.extra_cached = cached_tokens
        table = live.sequence.table
        try:
            self._runner.kv_memory.adopt(table.blocks[table.num_cached :])
        except RankLost as error:
            log.warning("a prompt that has landed is computed again: %s", error)
            self.transfer_failed(sequence_id, report)
            return
        self._scheduler.landed(live.sequence, live.sequence.num_prompt)
        known = live.sequence.known
        first = Sampled(sequence_id, known[0]) if known else sampled
        self._advance(live, first, self._early)

    def transfer_failed(self, sequence_id: int, report: HandoffReport) -> None:
        """No worker could compute the prompt for us; nothing writes into the reserved blocks any more."""
        live = self._live.get(sequence_id)
        if live is None or live.sequence.state is not State.TRANSFERRING:
            return
        if live.is_cancelled:
            self._drop(live)
            return
        if live.sequence.kind is Kind.MIGRANT:
            self._early.append((sequence_id, _error(live.sequence, Refusal.NOT_MOVABLE, "it could not be moved here")))
            self._drop(live)
            return
        live.report = report
        live.computed_from_s = self._clock()
        if live.has_lost_blocks:
            table = live.sequence.table
            live.sequence.num_computed = table.num_cached = table.num_published = 0
        self._scheduler.prefill_here(live.sequence)

    def settle(self) -> None:
        """Waits for the step that runs, if one does; what it brings comes with the result of the next step.

        For whoever looks at sequences or blocks between steps and wants no step to change them meanwhile.
        """
        running, self._running = self._running, None
        if running is not None:
            self._complete(running, self._settled)

    # ---- migration: the source ----

    def export(self, sequence_id: int, first_block: int, num_blocks: int) -> None:
        """Lets another worker copy a running sequence; what is final and what becomes of it shows in `StepResult.exports`."""
        self.settle()  # from here on no step runs ahead, so that the sequence can stand still between two
        live = self._live.get(sequence_id)
        try:
            if live is None:
                raise Refused(Refusal.NOT_MOVABLE, "the sequence has ended")
            self._exports.begin(live.sequence, first_block, num_blocks)
        except Refused as error:
            self._exports.ended.append(ExportEnded(sequence_id, str(error)))

    def halt(self, sequence_id: int) -> None:
        """The receiver has nearly everything: the sequence is to stand still at the next step boundary."""
        self._exports.halt(sequence_id)

    def resume(self, sequence_id: int) -> None:
        """The migration failed: the sequence goes on here with unchanged tokens."""
        self._exports.resume(sequence_id)

    def depart(self, sequence_id: int) -> None:
        """The receiver runs the sequence now: frees its blocks and tells the router where it left off."""
        sequence = self._exports.depart(sequence_id)
        if sequence is not None:
            name, position = sequence.request.request_id, len(sequence.known)
            self._early.append((sequence_id, Output(name, position, finish_reason=FinishReason.MOVED)))
            self._drop(self._live[sequence_id])

    # ---- migration: the target ----

    def add_migrant(self, sequence_id: int, request: Request) -> None:
        """Reserves room for a sequence that another worker runs, and asks for its blocks with TransferWanted.

        `request.replay_token_ids` are what the client has of it. Raises InvalidRequest, or Refused(QUEUE_FULL): it never waits.
        """
        self.check(request)
        live = self._make_live(sequence_id, request, Kind.MIGRANT)
        sequence = live.sequence
        reserve_migrant(
            self._scheduler, sequence, min(sequence.num_prompt + request.params.max_tokens, self._max_model_len)
        )
        self._live[sequence_id] = live
        self._show_known(live, request.replay_token_ids)
        table = sequence.table
        self._early_transfers.append(TransferWanted(sequence_id, table.num_cached, tuple(table.blocks)))

    def moved_in(self, sequence_id: int, known_token_ids: tuple[int, ...], num_computed: int) -> None:
        """A migrant's blocks are in place and verified, with its state: it goes on here where it stood."""
        live = self._live.get(sequence_id)
        if live is None or live.sequence.state is not State.TRANSFERRING:
            return
        if live.is_cancelled:
            self._drop(live)
            return
        table = live.sequence.table
        self._runner.kv_memory.adopt(table.blocks[table.num_cached : self._kv.blocks_for(num_computed)])
        try:
            land_migrant(self._scheduler, live.sequence, known_token_ids, num_computed)
        except Refused as error:
            self._early.append((sequence_id, _error(live.sequence, error.refusal, str(error))))
            self._drop(live)
            return
        self._show_known(live, known_token_ids)
        live.has_spoken = True

    def _show_known(self, live: _Live, token_ids: tuple[int, ...]) -> None:
        """Brings text and stop strings to where these tokens lead; the client has their text."""
        assert live.output is not None
        for token_id in token_ids[live.num_texted :]:
            live.output.push(token_id)
        live.num_texted = len(token_ids)

    def pulled(self, sequence_id: int, num_blocks: int) -> None:
        """Another worker has sent the first `num_blocks` of the blocks asked for; nothing writes into any of them any more."""
        live = self._live.get(sequence_id)
        pull = live.sequence.table.pull if live is not None else None
        if live is None or pull is None or pull.num_arrived is not None:
            return
        self._scheduler.pulled(live.sequence, num_blocks)
        if live.is_cancelled:
            self._drop(live)
        elif num_blocks:
            first = pull.first_block
            self._runner.kv_memory.adopt(live.sequence.table.blocks[first : first + num_blocks])

    def hold_prefix(self, export_id: int, keys: tuple[BlockKey, ...]) -> PrefixHeld:
        """Holds the longest run of these blocks that the pool has, for another worker to copy; at most a quarter of the pool."""
        room = self._kv.num_blocks // 4 - sum(map(len, self._held_prefixes.values()))
        blocks = self._kv.hold_prefix(keys, max(0, room))
        self._held_prefixes[export_id] = blocks
        self._runner.kv_memory.expose(blocks)
        return PrefixHeld(export_id, tuple(blocks))

    def release_prefix(self, export_id: int) -> None:
        self._kv.release_blocks(self._held_prefixes.pop(export_id, []))

    def take_early(self) -> StepResult | None:
        """What is to be said without waiting for another step: first tokens that came from elsewhere, and sequences that stand
        still for their receivers. None: nothing."""
        exports = self._exports.advance()
        if not (self._early or self._early_transfers or self._abandoned or exports):
            return None
        result = StepResult(self._early, self._early_transfers, exports=exports, abandoned=self._abandoned)
        self._early, self._early_transfers, self._abandoned = [], [], []
        return result

    @property
    def has_work(self) -> bool:
        """True when a step could compute, admit or report something."""
        busy = (State.DECODING, State.PREFILLING, State.PROMOTING)
        return bool(
            self._early
            or self._early_transfers
            or self._abandoned
            or self._running is not None
            or self._settled != StepResult()
            or self._exports.ended
            or self._scheduler.waiting
            or any(s.state in busy for s in self._scheduler.active)
        )

    def step(self) -> StepResult:
        """One engine step. A runner that raises fails the sequences of that batch and no others."""
        started = self._clock()
        result, self._settled = self._settled, StepResult()
        result.outputs += self._early
        result.transfers += self._early_transfers
        result.abandoned += self._abandoned
        self._early, self._early_transfers, self._abandoned = [], [], []
        self._poll_tiers(started)
        running = self._running or self._start(self._scheduler.schedule(), None, result)
        self._running = None
        self.made_no_progress = running is None
        if running is not None:
            if self._launcher is not None:
                ahead = schedule_ahead(self._scheduler, running.batch)
                self._running = None if ahead is None else self._start(ahead, running, result)
            self._complete(running, result)
        result.exports = self._exports.advance()
        result.kv_event = self._kv.take_event()
        self.last_step_s = self._clock() - started
        if running is not None:
            self._note_rate(running.batch)
        return result

    def _start(self, step: Step, after: _Running | None, result: StepResult) -> _Running | None:
        """Launches a step behind the one that runs, if any; None when it computes nothing."""
        now = self._clock()
        for sequence in step.promotions:
            self._live[sequence.sequence_id].promoted_by_s = now + PROMOTION_TIMEOUT_S
            self._ask_peer(sequence, result)
        for sequence in step.transfers:
            self._note_admission(self._live[sequence.sequence_id], now)
            blocks = tuple(sequence.table.blocks)
            wanted = TransferWanted(sequence.sequence_id, sequence.table.num_cached, blocks, sequence.hint)
            result.transfers.append(wanted)
        if not step.batch.num_tokens:
            return None
        slices = (*step.batch.prefill, *step.batch.decode)
        running = _Running(step.batch, [self._live[piece.sequence_id] for piece in slices])
        if self._launcher is not None:
            try:
                hook = self._layer_hook(step.batch)
                running.launched = self._launcher.launch(step.batch, after.launched if after else None, hook)
            except Exception as error:
                self._fail_all(running.lives, error, result)
                return None
        for live in running.lives:
            live.num_running += 1
            self._note_admission(live, now)
        return running

    def _complete(self, running: _Running, result: StepResult) -> None:
        """Waits for a step's results and accounts for them; those of sequences that ended meanwhile are dropped."""
        for live in running.lives:
            live.num_running -= 1
        try:
            if self._launcher is None:
                hook = self._layer_hook(running.batch)
                drawn = (
                    self._runner.execute(running.batch) if hook is None else self._runner.execute(running.batch, hook)
                )
            else:
                drawn = self._launcher.finish(running.launched)
        except PoolsLost as lost:
            level = logging.WARNING if lost.pools else logging.DEBUG
            log.log(
                level, "a step of %d sequences has to run again, pools %s: %s", len(running.lives), lost.pools, lost
            )
            self._lose(lost.pools, result)
        except Exception as error:
            self._fail_all(running.lives, error, result)
        else:
            slices, num_prefill = (*running.batch.prefill, *running.batch.decode), len(running.batch.prefill)
            for index, (live, piece, sampled) in enumerate(zip(running.lives, slices, drawn, strict=True)):
                if live.sequence.state is State.ENDING:
                    continue
                if index < num_prefill:
                    self._after_prefill(live, piece, sampled, result)
                else:
                    self._scheduler.computed_decode(live.sequence)
                    self._advance(live, sampled, result.outputs)
        for live in running.lives:
            if live.sequence.state is State.ENDING and not live.num_running:
                self._scheduler.finish(live.sequence)

    def on_tiers_ready(self, notify: Callable[[], None]) -> None:
        """`notify` is called, on another thread, when a step would find something new from a lower tier."""
        if self._tiers is not None:
            self._tiers.on_result(notify)

    def rest(self, timeout_s: float) -> None:
        """After a step without progress: returns when another could make some, or after so long."""
        if self._tiers is not None:
            self._tiers.wait(timeout_s)

    def close(self) -> None:
        """Ends what works beside the engine; no step after this."""
        if self._tiers is not None:
            self._tiers.close()

    def _note_rate(self, batch: Batch) -> None:
        num_tokens = sum(len(piece.token_ids) for piece in batch.prefill)
        if num_tokens >= BLOCK_SIZE and self.last_step_s > 0:
            rate, before = num_tokens / self.last_step_s, self.prefill_tokens_per_s
            self.prefill_tokens_per_s = rate if before is None else before + 0.3 * (rate - before)

    def forget_cache(self) -> None:
        """Empties the prefix cache: what it holds may be gone with a rank."""
        for pool in range(self._runner.num_pools):
            self._kv.forget_pool(pool)

    def kv_dump(self) -> KvEvent:
        """All hashes in the prefix cache."""
        return self._kv.dump()

    @property
    def num_held_blocks(self) -> int:
        """Blocks that some sequence holds; 0 when idle, or something leaks."""
        return self._kv.num_held

    def load(self) -> Load:
        sequences = self._scheduler.active
        states = [s.state for s in sequences]
        return Load(
            num_waiting=len(self._scheduler.waiting),
            num_running=sum(1 for s in states if s in (State.DECODING, State.PREFILLING)),
            num_transferring=sum(1 for s in states if s in _WAITS_FOR_OTHERS),
            waiting_prefill_tokens=sum(
                s.num_uncomputed_prompt
                for s in (*self._scheduler.waiting, *sequences)
                if s.state in (State.WAITING, State.PROMOTING, State.PREFILLING) and s.kind is not Kind.TARGET
            ),
            num_free_blocks=self._kv.num_available,
            num_blocks=self._kv.num_blocks,
            step_s=self.last_step_s,
        )

    def counters(self) -> tuple[tuple[str, float], ...]:
        counters = self._scheduler.counters
        own = tuple((name, float(getattr(counters, name))) for name in counters.__slots__)
        return own if self._tiers is None else own + self._tiers.counters()

    def _ask_peer(self, sequence: Sequence, result: StepResult) -> None:
        pull, hint = sequence.table.pull, sequence.hint
        if pull is not None and hint is not None:
            blocks = tuple(sequence.table.blocks[: pull.first_block + len(pull.keys)])
            wanted = PullWanted(
                sequence.sequence_id, hint.peer, pull.first_block, blocks, pull.keys, self.prefill_tokens_per_s or 0.0
            )
            result.pulls.append(wanted)

    def _poll_tiers(self, now: float) -> None:
        """Takes over what came from lower tiers, and ends waits that took too long."""
        if self._tiers is None:
            return
        self._tiers.poll()
        for sequence in self._scheduler.active:
            if sequence.state is State.PROMOTING and now >= self._live[sequence.sequence_id].promoted_by_s:
                self._scheduler.give_promotion_up(sequence)

    def _note_admission(self, live: _Live, now: float) -> None:
        if live.queue_s is None:
            live.queue_s = max(0.0, now - live.started_s)

    def _layer_hook(self, batch: Batch) -> LayerHook | None:
        """None when nothing of the batch is for another worker, or nobody listens."""
        listener = self.on_layers
        sources = [s for s in batch.prefill if self._live[s.sequence_id].sequence.kind is Kind.SOURCE]
        layout = self._runner.kv_memory.layout
        every = layers_per_piece(layout)
        if listener is None or not sources or every >= layout.num_layers:
            return None
        fills: list[LayersFilled] = []
        for piece in sources:
            table, end = self._live[piece.sequence_id].sequence.table, piece.start + len(piece.token_ids)
            first, blocks = piece.start // BLOCK_SIZE, tuple(table.blocks)
            # Where the prompt ends its last block is as full as it will be.
            last = len(blocks) if piece.sample is not None else end // BLOCK_SIZE
            fills.append(LayersFilled(piece.sequence_id, blocks, first, last, 0))

        def tell(num_layers: int) -> None:
            for fill in fills:
                listener(replace(fill, num_layers=num_layers))

        return LayerHook(every, tell, tuple(b for fill in fills for b in fill.blocks[fill.first : fill.end]))

    def _after_prefill(self, live: _Live, piece: SequenceSlice, sampled: Sampled, result: StepResult) -> None:
        sequence = live.sequence
        self._scheduler.computed_prefill(sequence, len(piece.token_ids))
        live.prompt_logprobs[piece.start :] = sampled.prompt_logprobs
        if sequence.kind is not Kind.SOURCE:
            if sampled.token_id is not None:
                self._advance(live, sampled, result.outputs)
            return
        done = sampled.token_id is not None
        blocks = tuple(sequence.table.blocks)
        num_filled = len(blocks) if done else sequence.num_computed // BLOCK_SIZE
        is_first = piece.start <= sequence.table.num_cached * BLOCK_SIZE  # cached blocks were never shown to a transfer
        try:
            self._runner.kv_memory.expose(blocks[0 if is_first else piece.start // BLOCK_SIZE : num_filled])
        except RankLost as error:
            self._fail(live, Refusal.WORKER_LOST, str(error), result)
            return
        result.filled.append(BlocksFilled(sequence.sequence_id, blocks, num_filled))
        if done:
            elapsed = self._clock() - live.started_s
            result.prefilled.append(Prefilled(sequence.sequence_id, sampled, sequence.num_cached_tokens, elapsed))

    def _advance(self, live: _Live, sampled: Sampled, outputs: list[tuple[int, Output]]) -> None:
        """Accounts for a drawn or replayed token; emits it when the client does not have it yet."""
        assert sampled.token_id is not None and live.output is not None
        sequence = live.sequence
        position = sequence.num_drawn
        num_given = len(sequence.request.replay_token_ids)
        is_new = self._scheduler.drew(sequence, sampled.token_id)
        if position < live.num_texted:
            return
        live.num_texted += 1
        progress = live.output.push(sampled.token_id)
        if position >= num_given or progress.finish_reason is not None:
            logprobs = (sampled.logprob,) if sampled.logprob is not None and is_new else ()
            output = Output(
                request_id=sequence.request.request_id,
                position=position if is_new else num_given,
                token_ids=(sampled.token_id,) if is_new else (),
                text=progress.text,
                logprobs=logprobs,
                finish_reason=progress.finish_reason,
                stop_reason=progress.stop_reason,
            )
            outputs.append((sequence.sequence_id, output if live.has_spoken else self._first(live, output)))
            live.has_spoken = True
        if progress.finish_reason is not None:
            self._drop(live)

    def _first(self, live: _Live, output: Output) -> Output:
        """Adds what is said once: cached tokens, prompt logprobs and how the prompt was computed."""
        sequence = live.sequence
        report = live.report
        if report is None or report.transport == "local":
            report = report or HandoffReport(self._worker_id, self._worker_id, "local")
            since_s = live.computed_from_s or live.started_s + (live.queue_s or 0.0)
            report = replace(report, prefill_s=self._clock() - since_s)
        report = replace(report, queue_s=live.queue_s or 0.0)
        wanted = sequence.request.params.prompt_logprobs is not None
        return replace(
            output,
            cached_tokens=max(sequence.num_cached_tokens, live.extra_cached),
            handoff=report,
            prompt_logprobs=(None, *live.prompt_logprobs[: sequence.num_prompt - 1]) if wanted else None,
        )

    def _fail_all(self, lives: list[_Live], error: Exception, result: StepResult) -> None:
        log.error("a step of %d sequences failed", len(lives), exc_info=error)
        for live in lives:
            if live.sequence.state is not State.ENDING:
                self._fail(live, Refusal.INTERNAL, f"the model failed: {error}", result)

    def _lose(self, pools: tuple[int, ...], result: StepResult) -> None:
        """Starts again what lived in lost pools. A transfer under way is let finish, and its prompt computed here."""
        for pool in pools:
            for sequence in self._scheduler.lose_pool(pool):
                live = self._live[sequence.sequence_id]
                if sequence.state is State.TRANSFERRING:
                    live.has_lost_blocks = True
                elif sequence.table.pull is not None and sequence.table.pull.num_arrived is None:
                    result.outputs.append((sequence.sequence_id, _error(sequence, Refusal.WORKER_LOST, LOST_WITH_RANK)))
                    if not live.is_cancelled:
                        live.is_cancelled = True
                        result.abandoned.append(sequence.sequence_id)
                else:
                    self._fail(live, Refusal.WORKER_LOST, LOST_WITH_RANK, result)

    def _fail(self, live: _Live, refusal: Refusal, message: str, result: StepResult) -> None:
        sequence = live.sequence
        result.outputs.append((sequence.sequence_id, _error(sequence, refusal, message)))
        self._drop(live)

    def _drop(self, live: _Live) -> None:
        del self._live[live.sequence.sequence_id]
        if live.num_running:
            self._scheduler.end(live.sequence)
        else:
            self._scheduler.finish(live.sequence)


def _error(sequence: Sequence, refusal: Refusal, message: str) -> Output:
    return Output(
        request_id=sequence.request.request_id,
        position=len(sequence.known),
        finish_reason=FinishReason.ERROR,
        refusal=refusal,
        message=message,
    )


def refusal_output(request: Request, error: InvalidRequest | Refused) -> Output:
    """The output that tells a router that a request was not accepted."""
    refusal = Refusal.INVALID if isinstance(error, InvalidRequest) else error.refusal
    return Output(
        request_id=request.request_id,
        position=len(request.replay_token_ids),
        finish_reason=FinishReason.ERROR,
        refusal=refusal,
        message=str(error),
    )
