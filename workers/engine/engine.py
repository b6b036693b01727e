"""The step loop: schedule, run, sample, advance. Used by a worker's engine thread and directly by the offline LLM; knows no network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.engine.incoming import IncomingKv, Promotions
from workers.engine.isolation import isolate
from workers.engine.leaping import DrawRun, leap, leapers
from workers.engine.live_sequences import Live, LiveSequences
from workers.engine.messages import StepResult
from workers.engine.outgoing import Moves, OutgoingKv
from workers.errors import DeviceStuck, InvalidRequest, PoolsLost, Refusal, Refused
from workers.grammar.grammars import Grammars
from workers.grammar.vocabulary import GrammarVocabulary
from workers.kv_cache.manager import KvCacheManager
from workers.kv_cache.pools import PooledKvCache
from workers.kv_tiers.tiers import KvTiers
from workers.limits import DEFAULT_LIMITS, RequestLimits
from workers.request import Request, error_output, refusal_output
from workers.runner import BLOCK_SIZE, Batch, LaunchingRunner, Runner, Sampled, SequenceSlice
from workers.scheduler.ahead import schedule_ahead
from workers.scheduler.load import StepWork, has_work, load_of, work_of
from workers.scheduler.scheduler import Limits, ScheduledStep, Scheduler
from workers.scheduler.sequence import Kind, Sequence, State
from workers.status import Load, PrefixHint
from workers.text.output import Detokenizer

log = logging.getLogger(__name__)

MODEL_FAILED = "the model failed to compute this request"
"""What a client hears; the log says why."""


@dataclass(slots=True, eq=False)
class _Running:
    """A step from its launch to its results; `launched` is the runner's handle, where it launches at all."""

    batch: Batch
    lives: list[Live]
    """In the order of the results: prefill, then decode."""
    launched: Any = None
    error: Exception | None = None
    """Why it could not be launched."""

    @property
    def slices(self) -> tuple[SequenceSlice, ...]:
        return (*self.batch.prefill, *self.batch.decode)

    @property
    def num_prefill(self) -> int:
        return len(self.batch.prefill)


class Engine:
    """Runs sequences on one Runner. One thread owns it.

    What concerns other workers goes through `incoming`, `outgoing` and `moves`: what they write here, copy from here, take over.
    `make_detokenizer(request)` gives a fresh Detokenizer; without `vocabulary` requests with a grammar are refused. `max_model_len` bounds prompt + output in tokens. `keeps_outputs`: see Scheduler. With
    `overlap_steps`, a runner that can launch (LaunchingRunner) computes a step while the next one is scheduled.
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
        vocabulary: GrammarVocabulary | None = None,
        request_limits: RequestLimits = DEFAULT_LIMITS,
        keeps_outputs: bool = False,
    ) -> None:
        self._grammars = Grammars(vocabulary, runner.vocab_size, eos_token_ids, clock)
        self._runner = runner
        self._launcher = runner if overlap_steps and isinstance(runner, LaunchingRunner) else None
        self._running: _Running | None = None
        self._clock = clock
        num_pools, num_blocks = runner.num_pools, runner.kv_memory.layout.num_blocks
        self._kv = (
            KvCacheManager(num_blocks, BLOCK_SIZE, prefix_cache, tiers)
            if num_pools == 1
            else PooledKvCache(num_pools, num_blocks // num_pools, BLOCK_SIZE, prefix_cache)
        )
        self._scheduler = Scheduler(self._kv, limits, keeps_outputs)
        self._sequences = LiveSequences(
            self._scheduler,
            make_detokenizer=make_detokenizer,
            eos_token_ids=eos_token_ids,
            vocab_size=runner.vocab_size,
            max_model_len=max_model_len,
            worker_id=worker_id,
            clock=clock,
            grammars=self._grammars,
            limits=request_limits,
        )
        self._promotions = Promotions(tiers, self._scheduler)
        self.incoming = IncomingKv(self._sequences, runner.kv_memory)
        self.outgoing = OutgoingKv(self._sequences, runner.kv_memory)
        self.moves = Moves(self._sequences, runner.kv_memory)
        self.last_step = StepWork()
        """The last one that computed anything."""
        self.prefill_tokens_per_s: float | None = None
        """Of recent steps with prompts, smoothed."""
        self.made_no_progress = False
        """The last step computed nothing: every sequence waits for blocks or for another worker."""

    def check(self, request: Request) -> None:
        """Raises InvalidRequest when this engine can never serve the request."""
        self._sequences.check(request)

    def add(self, sequence_id: int, request: Request, kind: Kind = Kind.LOCAL, hint: PrefixHint | None = None) -> None:
        """Queues a request under the caller's id. Raises InvalidRequest or Refused(QUEUE_FULL)."""
        live = self._sequences.arrive(sequence_id, request, kind, hint)
        self._scheduler.add(live.sequence)
        self._sequences.lives[sequence_id] = live

    def refuse(self, sequence_id: int, request: Request, error: InvalidRequest | Refused) -> None:
        """Says in the next result that the request was not accepted."""
        self._sequences.pending.outputs.append((sequence_id, refusal_output(request, error)))

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence without further output and frees what it holds; unknown ids are ignored.

        Also releases a finished prefill that another worker has taken.
        """
        live = self._sequences.lives.get(sequence_id)
        if live is not None and not self.incoming.cancel(live):
            self._sequences.drop(live)

    @property
    def has_work(self) -> bool:
        """True when a step could compute, admit or report something."""
        return self._sequences.has_news or self._running is not None or self._takes_bites or has_work(self._scheduler)

    @property
    def _takes_bites(self) -> bool:
        """The next step would copy more of what cannot all be copied between two steps."""
        return (
            self.incoming.is_adopting
            or self.outgoing.is_showing
            or self._promotions.is_copying
            or self._kv.is_making_room
        )

    def take_early(self) -> StepResult | None:
        """What is to be said without waiting for another step: refusals, first tokens that came from elsewhere, sequences that
        stand still for their receivers. None: nothing."""
        self.moves.advance()
        return self._sequences.take_pending() if self._sequences.has_news else None

    def settle(self) -> None:
        """Waits for the step that runs, if one does; what it brings comes with the next result.

        For whoever looks at sequences or blocks between steps and wants no step to change them meanwhile.
        """
        running, self._running = self._running, None
        if running is not None:
            self._complete(running)

    def export(self, sequence_id: int, first_block: int, num_blocks: int) -> None:
        """Lets another worker copy a running sequence; what is final and what becomes of it shows in `StepResult.exports`."""
        self.settle()  # from here on no step runs ahead, so that the sequence can stand still between two
        self.moves.begin(sequence_id, first_block, num_blocks)

    def step(self) -> StepResult:
        """One engine step. When the runner raises, the step runs again in parts, and a sequence fails that fails alone.

        Raises DeviceStuck when the runner can compute nothing any more: only the end of this process helps.
        """
        started = self._clock()
        self._promotions.poll(started)
        if self._grammars.waiting:
            self._fail_grammars(started)
        self.incoming.advance()
        self.outgoing.advance()
        running = self._running or self._start(self._scheduler.schedule(), None)
        self._running = None
        self.made_no_progress = running is None and not self._takes_bites
        if running is not None:
            if self._launcher is not None and running.error is None:
                ahead = schedule_ahead(self._scheduler, running.batch)
                self._running = None if ahead is None else self._start(ahead, running)
            self._complete(running)
        self.moves.advance()
        result = self._sequences.take_pending()
        if result.kv_event is None:
            result.kv_event = self._kv.take_event()
        if running is not None:
            self.last_step = work = work_of(running.batch, self._clock() - started)
            self._scheduler.pace.took(work.step_s, work.step_decodes, work.step_prompt_tokens, work.step_prompt_context)
            if not work.step_prompt_tokens:
                self._scheduler.turns.took(work.step_s, work.step_decodes, work.step_context)
            self._note_rate()
        return result

    def sequence(self, sequence_id: int) -> Sequence | None:
        """One that lives, to look at; the engine owns it."""
        live = self._sequences.lives.get(sequence_id)
        return None if live is None else live.sequence

    def leapers(self) -> tuple[list[Sequence], int]:
        """As workers.engine.leaping.leapers, of this engine as it is between two steps."""
        if self._running is not None or self._takes_bites or self._runner.num_pools > 1:
            return [], 0
        return leapers(self._scheduler, self._sequences)

    def leap(self, decoding: list[Sequence], steps_s: list[float], draw: DrawRun) -> StepResult:
        """Takes at once some of the steps that `leapers` has found: one for each of `steps_s`, which says how long it took."""
        leap(self._scheduler, self._sequences, decoding, len(steps_s), draw)
        for step_s in steps_s:
            self._scheduler.pace.took(step_s, len(decoding), 0, 0)
        context = sum([sequence.num_computed - 1 for sequence in decoding])
        self.last_step, self.made_no_progress = StepWork(steps_s[-1], len(decoding), context), False
        result = self._sequences.take_pending()
        result.kv_event = self._kv.take_event()
        return result

    def _start(self, step: ScheduledStep, after: _Running | None) -> _Running | None:
        """Launches a step behind the one that runs, if any; None when it computes nothing."""
        now, lives = self._clock(), self._sequences.lives
        for sequence in step.promotions:
            self._promotions.begin(sequence, now)
            self.incoming.pull(sequence, self.prefill_tokens_per_s or 0.0)
        for sequence in step.transfers:
            lives[sequence.sequence_id].admitted(now)
            self.incoming.want(sequence)
        if not step.batch.num_tokens:
            return None
        running = _Running(step.batch, [])
        running.lives = [lives[piece.sequence_id] for piece in running.slices]
        if self._launcher is not None:
            try:
                hook = self.outgoing.layer_hook(step.batch)
                running.launched = self._launcher.launch(step.batch, after.launched if after else None, hook)
            except DeviceStuck:
                raise
            except Exception as error:
                if after is not None:  # what was to follow is chosen again when the step that runs has ended
                    log.warning("a step of %d sequences cannot be launched ahead", len(running.lives), exc_info=error)
                    return None
                running.error = error
        for live in running.lives:
            live.num_running += 1
            live.admitted(now)
        return running

    def _complete(self, running: _Running) -> None:
        """Waits for a step's results and accounts for them; those of sequences that ended meanwhile are dropped."""
        self._ended(running)
        try:
            drawn = self._wait_for(running)
        except PoolsLost as lost:
            self._lose(running, lost)
        except DeviceStuck:
            raise
        except Exception as error:
            self._discard_ahead()
            self._run_in_parts(running, error)
        else:
            self._account(running, dict(enumerate(drawn)))
        self._free_ended(running)

    def _ended(self, running: _Running) -> None:
        for live in running.lives:
            live.num_running -= 1

    def _free_ended(self, running: _Running) -> None:
        for live in running.lives:
            if live.sequence.state is State.ENDING and not live.num_running:
                self._scheduler.finish(live.sequence)

    def _lose(self, running: _Running, lost: PoolsLost) -> None:
        level = logging.WARNING if lost.pools else logging.DEBUG
        log.log(level, "a step of %d sequences has to run again, pools %s: %s", len(running.lives), lost.pools, lost)
        for pool in lost.pools:
            for sequence in self._scheduler.lose_pool(pool):
                self.incoming.lose(sequence)

    def _discard_ahead(self) -> None:
        """Waits for the step behind one that has failed, if there is one; all it computes will be computed again."""
        ahead, self._running = self._running, None
        if ahead is None:
            return
        self._ended(ahead)
        try:
            self._wait_for(ahead)
        except DeviceStuck:
            raise
        except Exception as error:
            log.info("the step behind a failed one failed too: %s", error)
        self._free_ended(ahead)

    def _run_in_parts(self, running: _Running, error: Exception) -> None:
        """A step has failed: runs it in parts, so that only sequences fail that fail without the others."""
        log.error("a step of %d sequences failed", len(running.lives), exc_info=error)
        # A token that was drawn while the step ran is known by now.
        again = [
            (index, live.sequence.decode_slice() if index >= running.num_prefill else piece)
            for index, (live, piece) in enumerate(zip(running.lives, running.slices, strict=True))
            if live.sequence.state is not State.ENDING
        ]
        num_prefill = sum(index < running.num_prefill for index, _ in again)

        def run(part: range) -> list[Sampled]:
            prefill = [again[place][1] for place in part if place < num_prefill]
            decode = [again[place][1] for place in part if place >= num_prefill]
            return self._runner.execute(Batch(tuple(prefill), tuple(decode)))

        found = isolate(len(again), error, run)
        self._account(running, {again[place][0]: sampled for place, sampled in found.drawn.items()})
        for place, why in found.failed.items():
            live = running.lives[again[place][0]]
            sequence = live.sequence
            about = sequence.request.log_fields
            log.error("sequence %d fails", sequence.sequence_id, exc_info=why, extra=about)
            self._sequences.fail(live, Refusal.INTERNAL, MODEL_FAILED)
        if found.lost is not None:
            self._lose(running, found.lost)

    def _wait_for(self, running: _Running) -> list[Sampled]:
        if running.error is not None:
            raise running.error
        if self._launcher is not None:
            return self._launcher.finish(running.launched)
        hook = self.outgoing.layer_hook(running.batch)
        return self._runner.execute(running.batch) if hook is None else self._runner.execute(running.batch, hook)

    def _account(self, running: _Running, drawn: dict[int, Sampled]) -> None:
        """`drawn`: what came of each slice, by its place in the step."""
        slices, num_prefill = running.slices, running.num_prefill
        for index, sampled in drawn.items():
            live, piece = running.lives[index], slices[index]
            if live.sequence.state is State.ENDING:
                continue
            if live.sequence.constraint is not None and live.sequence.constraint.error:
                self._sequences.fail(live, Refusal.INVALID, f"grammar: {live.sequence.constraint.error}")
                continue
            if index >= num_prefill:
                self._scheduler.computed_decode(live.sequence)
                self._sequences.drew(live, sampled)
                continue
            self._scheduler.computed_prefill(live.sequence, len(piece.token_ids))
            if live.answer is None:
                self.outgoing.computed(live, piece, sampled)
                continue
            if sampled.prompt_logprobs is not None:
                self._sequences.scored(live, sampled.prompt_logprobs)
            if sampled.token_id is not None:
                self._sequences.drew(live, sampled)

    def _fail_grammars(self, now: float) -> None:
        for sequence_id, error in self._grammars.poll(now):
            live = self._sequences.lives.get(sequence_id)
            if live is None:
                continue
            output = error_output(live.sequence.request, Refusal.INVALID, f"grammar: {error}")
            self._sequences.pending.outputs.append((sequence_id, output))
            if not self.incoming.cancel(live):
                self._sequences.drop(live)

    def _note_rate(self) -> None:
        step_s, num_tokens = self.last_step.step_s, self.last_step.step_prompt_tokens
        if num_tokens >= BLOCK_SIZE and step_s > 0:
            rate, before = num_tokens / step_s, self.prefill_tokens_per_s
            self.prefill_tokens_per_s = rate if before is None else before + 0.3 * (rate - before)

    # ---- beside the steps ----

    def on_ready(self, notify: Callable[[], None]) -> None:
        """`notify` is called, on another thread, when a step would find a grammar, or something new from a lower tier."""
        self._promotions.on_ready(notify)
        self._grammars.on_ready(notify)

    def rest(self, timeout_s: float) -> None:
        """After a step without progress: returns when another could make some, or after so long."""
        if not self._grammars.wait(timeout_s):
            self._promotions.wait(timeout_s)

    def close(self) -> None:
        """Ends what works beside the engine; no step after this."""
        self._promotions.close()
        self._grammars.close()

    def forget_cache(self) -> None:
        """Empties the prefix cache: what it holds may be gone with a rank."""
        for pool in range(self._runner.num_pools):
            self._kv.forget_pool(pool)

    def dump_cache(self, asker: int = 0) -> None:
        """Says in the next result, for `asker`, all hashes that are in the prefix cache; what changes after that comes as events.

        Everybody else goes on with events: none is lost for them, and none repeated.
        """
        said = self._sequences.pending
        if said.kv_dump is None:
            said.kv_event = self._kv.take_event()
            said.kv_dump = self._kv.dump()
        said.dump_askers.append(asker)

    @property
    def num_held_blocks(self) -> int:
        """Blocks that some sequence holds; 0 when idle, or something leaks."""
        return self._kv.num_held

    def check_blocks(self) -> None:
        """Compares what sequences hold with what the pool believes. Raises InvariantViolated; a walk over all of them, for tests."""
        tables = [sequence.table.blocks for sequence in self._scheduler.active]
        self._kv.check([*tables, *self.outgoing.held_prefixes])

    def load(self) -> Load:
        return load_of(self._scheduler, self.last_step)

    def counters(self) -> tuple[tuple[str, float], ...]:
        counters = self._scheduler.counters
        own = tuple((name, float(getattr(counters, name))) for name in counters.__slots__)
        return own + self._promotions.counters()
