"""The step loop: schedule, run, sample, advance. Used by a worker's engine thread and directly by the offline LLM; knows no network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from workers.errors import InvalidRequest, PoolsLost, Refusal, Refused
from workers.kv_cache.manager import KvCacheManager
from workers.kv_cache.pools import PooledKvCache
from workers.request import FinishReason, HandoffReport, Output, Request, TokenLogprob
from workers.runner import BLOCK_SIZE, Runner, Sampled, SequenceSlice
from workers.sampling.output import Detokenizer, OutputState
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.sequence import Kind, Sequence, State
from workers.status import KvEvent, Load

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransferWanted:
    """Blocks are reserved: another worker shall fill `blocks`; those before `first_block` hold the prefix already."""

    sequence_id: int
    first_block: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksFilled:
    """A prompt computed for another worker has its first `num_filled` blocks complete."""

    sequence_id: int
    blocks: tuple[int, ...]
    num_filled: int


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
    abandoned: list[int] = field(default_factory=list)
    """TRANSFERRING sequences that were cancelled: their blocks stay reserved until `transfer_failed` confirms that
    nothing writes into them any more."""
    kv_event: KvEvent | None = None


@dataclass(slots=True, eq=False)
class _Live:
    sequence: Sequence
    output: OutputState | None
    started_s: float
    report: HandoffReport | None = None
    extra_cached: int = 0
    is_cancelled: bool = False
    has_lost_blocks: bool = False
    """Its blocks lost what they held while another worker wrote into them."""
    has_spoken: bool = False
    num_texted: int = 0
    """Tokens that `output` has seen; a replay after a preemption does not show them again."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


class Engine:
    """Runs sequences on one Runner. One thread owns it.

    `make_detokenizer(request)` gives a fresh Detokenizer. `max_model_len` bounds prompt + output in tokens.
    `hands_off` False: this engine's KV cannot be reached by other workers, so it computes every prompt itself.
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
        worker_id: str = "local",
        hands_off: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._make_detokenizer = make_detokenizer
        self._eos = eos_token_ids
        self._max_model_len = max_model_len
        self._worker_id = worker_id
        self._hands_off = hands_off
        self._clock = clock
        num_pools, num_blocks = runner.num_pools, runner.kv_memory.layout.num_blocks
        self._kv = (
            KvCacheManager(num_blocks, BLOCK_SIZE, prefix_cache)
            if num_pools == 1
            else PooledKvCache(num_pools, num_blocks, BLOCK_SIZE, prefix_cache)
        )
        self._scheduler = Scheduler(self._kv, limits)
        self._live: dict[int, _Live] = {}
        self._arrivals = 0
        self._abandoned: list[int] = []
        self._early: list[tuple[int, Output]] = []
        self.last_step_s = 0.0
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

    def add(self, sequence_id: int, request: Request, kind: Kind = Kind.LOCAL) -> None:
        """Queues a request under the caller's id. Raises InvalidRequest or Refused(QUEUE_FULL, WRONG_ROLE)."""
        self.check(request)
        if not self._hands_off:
            if kind is Kind.SOURCE:
                raise Refused(
                    Refusal.WRONG_ROLE, "this worker's KV is spread over ranks that other workers cannot read"
                )
            kind = Kind.LOCAL
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
        )
        self._scheduler.add(sequence)
        self._live[sequence_id] = _Live(sequence, output, self._clock())

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence without further output and frees what it holds; unknown ids are ignored.

        Also releases a finished prefill that another worker has taken.
        """
        live = self._live.get(sequence_id)
        if live is None:
            return
        if live.sequence.state is State.TRANSFERRING:
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
        self._runner.kv_memory.adopt(table.blocks[table.num_cached :])
        self._scheduler.landed(live.sequence)
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
        live.report = report
        if live.has_lost_blocks:
            table = live.sequence.table
            live.sequence.num_computed = table.num_cached = table.num_published = 0
        self._scheduler.prefill_here(live.sequence)

    @property
    def has_work(self) -> bool:
        """True when a step could compute, admit or report something."""
        busy = (State.DECODING, State.PREFILLING)
        return bool(
            self._early
            or self._abandoned
            or self._scheduler.waiting
            or any(s.state in busy for s in self._scheduler.active)
        )

    def step(self) -> StepResult:
        """One engine step. A runner that raises fails the sequences of that batch and no others."""
        started = self._clock()
        result = StepResult(outputs=self._early, abandoned=self._abandoned)
        self._early, self._abandoned = [], []
        step = self._scheduler.schedule()
        for sequence in step.transfers:
            blocks = tuple(sequence.table.blocks)
            result.transfers.append(TransferWanted(sequence.sequence_id, sequence.table.num_cached, blocks))
        self.made_no_progress = not step.batch.num_tokens
        if step.batch.num_tokens:
            slices = (*step.batch.prefill, *step.batch.decode)
            try:
                drawn = self._runner.execute(step.batch)
            except PoolsLost as lost:
                level = logging.WARNING if lost.pools else logging.DEBUG
                log.log(level, "a step of %d sequences has to run again, pools %s: %s", len(slices), lost.pools, lost)
                self._lose(lost.pools, result)
            except Exception as error:
                log.exception("a step of %d sequences failed", len(slices))
                for piece in slices:
                    self._fail(self._live[piece.sequence_id], Refusal.INTERNAL, f"the model failed: {error}", result)
            else:
                num_prefill = len(step.batch.prefill)
                for index, (piece, sampled) in enumerate(zip(slices, drawn, strict=True)):
                    live = self._live[piece.sequence_id]
                    if index < num_prefill:
                        self._after_prefill(live, piece, sampled, result)
                    else:
                        self._scheduler.computed_decode(live.sequence)
                        self._advance(live, sampled, result.outputs)
        result.kv_event = self._kv.take_event()
        self.last_step_s = self._clock() - started
        return result

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
            num_transferring=sum(1 for s in states if s in (State.TRANSFERRING, State.HELD)),
            waiting_prefill_tokens=sum(
                s.num_uncomputed_prompt
                for s in (*self._scheduler.waiting, *sequences)
                if s.state in (State.WAITING, State.PREFILLING) and s.kind is not Kind.TARGET
            ),
            num_free_blocks=self._kv.num_available,
            num_blocks=self._kv.num_blocks,
            step_s=self.last_step_s,
        )

    def counters(self) -> tuple[tuple[str, float], ...]:
        counters = self._scheduler.counters
        return tuple((name, float(getattr(counters, name))) for name in counters.__slots__)

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
        self._runner.kv_memory.expose(blocks[0 if is_first else piece.start // BLOCK_SIZE : num_filled])
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
            attempts = report.attempts if report else 1
            elapsed = self._clock() - live.started_s
            report = HandoffReport(self._worker_id, self._worker_id, "local", prefill_s=elapsed, attempts=attempts)
        wanted = sequence.request.params.prompt_logprobs is not None
        return replace(
            output,
            cached_tokens=max(sequence.num_cached_tokens, live.extra_cached),
            handoff=report,
            prompt_logprobs=(None, *live.prompt_logprobs[: sequence.num_prompt - 1]) if wanted else None,
        )

    def _lose(self, pools: tuple[int, ...], result: StepResult) -> None:
        """Starts again what lived in lost pools. A transfer under way is let finish, and its prompt computed here."""
        for pool in pools:
            for sequence in self._scheduler.lose_pool(pool):
                live = self._live[sequence.sequence_id]
                if sequence.state is State.TRANSFERRING:
                    live.has_lost_blocks = True
                else:
                    self._fail(live, Refusal.WORKER_LOST, "the rank that held this prompt was lost", result)

    def _fail(self, live: _Live, refusal: Refusal, message: str, result: StepResult) -> None:
        sequence = live.sequence
        output = Output(
            request_id=sequence.request.request_id,
            position=len(sequence.known),
            finish_reason=FinishReason.ERROR,
            refusal=refusal,
            message=message,
        )
        result.outputs.append((sequence.sequence_id, output))
        self._drop(live)

    def _drop(self, live: _Live) -> None:
        del self._live[live.sequence.sequence_id]
        self._scheduler.finish(live.sequence)


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
