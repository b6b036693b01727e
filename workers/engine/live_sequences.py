"""The sequences of one engine from arrival to end, and what their clients hear of each: every token once; knows no runner, no steps and no other workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workers.engine.messages import StepResult
from workers.errors import InvalidRequest, Refusal
from workers.kv_cache.block_hash import PromptTokens
from workers.limits import DEFAULT_LIMITS, RequestLimits
from workers.request import HandoffReport, Output, Request, error_output
from workers.runner import Sampled
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Kind, Sequence
from workers.status import PrefixHint
from workers.text.output import Detokenizer, OutputState
from workers.token_logprobs import PromptScores, scores_at_once

if TYPE_CHECKING:
    from workers.grammar.grammars import Grammars


class SequenceOutputs:
    """Reads its sequence and changes nothing in it. Times are the engine's clock, in seconds."""

    def __init__(self, sequence: Sequence, text: OutputState, worker_id: str, arrived_s: float) -> None:
        self._sequence = sequence
        self._text = text
        self._worker_id = worker_id
        self._num_texted = 0
        """Tokens that `text` has seen; a replay after a preemption does not show them again."""
        self._has_spoken = False
        self._num_scored = 1
        """Prompt tokens whose logprobs have been said; the first has none. A replay does not say them again."""
        self._report: HandoffReport | None = None
        self._landed_cached_tokens = 0
        self._queue_s: float | None = None
        """From its arrival until it had blocks."""
        self._computed_from_s = arrived_s
        """When this worker began to compute a prompt that did not come from elsewhere."""

    def admitted(self, now: float) -> None:
        """It has blocks; what comes after the first time is a preemption's business."""
        if self._queue_s is None:
            self._queue_s = max(0.0, now - self._computed_from_s)
            self._computed_from_s = now

    def landed(self, report: HandoffReport, cached_tokens: int) -> None:
        """Its prompt was computed by another worker, which had so many of its tokens in a cache."""
        self._report = report
        self._landed_cached_tokens = cached_tokens

    def computed_here(self, report: HandoffReport, now: float) -> None:
        """No other worker could compute its prompt; this one begins to."""
        self._report = report
        self._computed_from_s = now

    def continue_from(self, token_ids: tuple[int, ...]) -> None:
        """The client heard the beginning from another worker: brings text and stop strings to where these tokens lead."""
        for token_id in token_ids[self._num_texted :]:
            self._text.push(token_id)
        self._num_texted = len(token_ids)
        self._has_spoken = True

    def scored(self, scores: PromptScores) -> list[Output]:
        """What is to be said when a chunk of the prompt has been computed: its logprobs, unless the client has them."""
        request = self._sequence.request
        if request.replay_token_ids:
            return []
        outputs = []
        num_tokens = scores_at_once(scores.top_ids.shape[1])
        for start in range(max(self._num_scored, scores.first), scores.end, num_tokens):
            part = scores.part(start, start + num_tokens)
            outputs.append(Output(request.request_id, 0, prompt_logprobs=(part,)))
            self._num_scored = part.end
        return outputs

    def push(self, position: int, sampled: Sampled, is_new: bool, now: float) -> Output | None:
        """Accounts for the token at output position `position`, which is replayed unless it is new.

        None when the client has it. An output with a finish reason ends the sequence.
        """
        assert sampled.token_id is not None
        if position < self._num_texted:
            return None
        self._num_texted += 1
        progress = self._text.push(sampled.token_id)
        num_given = len(self._sequence.request.replay_token_ids)
        if position < num_given and progress.finish_reason is None:
            return None
        output = Output(
            request_id=self._sequence.request.request_id,
            position=position if is_new else num_given,
            token_ids=(sampled.token_id,) if is_new else (),
            text=progress.text,
            logprobs=(sampled.logprob,) if sampled.logprob is not None and is_new else (),
            finish_reason=progress.finish_reason,
            stop_reason=progress.stop_reason,
        )
        if not self._has_spoken:
            self._has_spoken = True
            output = self._first(output, now)
        return output

    @property
    def can_run(self) -> int:
        """So many tokens may be told as one output, with no look at each; none before the first token has been said."""
        is_replaying = self._num_texted < self._sequence.num_drawn or not self._has_spoken
        return 0 if is_replaying or self._sequence.request.params.logprobs is not None else self._text.can_run

    def push_run(self, position: int, token_ids: tuple[int, ...]) -> Output:
        """As `push`, for new tokens from `position` on, at most `can_run`."""
        self._num_texted += len(token_ids)
        return Output(self._sequence.request.request_id, position, token_ids, self._text.push_run(token_ids))

    def _first(self, output: Output, now: float) -> Output:
        """Adds what is said once: cached tokens, and how the prompt was computed."""
        sequence, report = self._sequence, self._report
        if report is None or report.transport == "local":
            report = report or HandoffReport(self._worker_id, self._worker_id, "local")
            report = replace(report, prefill_s=now - self._computed_from_s)
        return output._replace(
            cached_tokens=max(sequence.num_cached_tokens, self._landed_cached_tokens),
            handoff=replace(report, queue_s=self._queue_s or 0.0),
        )


@dataclass(slots=True, eq=False)
class Live:
    """A sequence, and what the scheduler need not know of it."""

    sequence: Sequence
    answer: SequenceOutputs | None
    """None: its prompt is computed for another worker, which answers."""
    arrived_s: float
    is_cancelled: bool = False
    has_lost_blocks: bool = False
    """Its blocks lost what they held while another worker wrote into them."""
    num_running: int = 0
    """Steps launched with it and not finished: until there is none, its blocks belong to nobody else."""

    def admitted(self, now: float) -> None:
        if self.answer is not None:
            self.answer.admitted(now)


class LiveSequences:
    """All that lives, by sequence id. `said` gathers what the engine's owner is to hear next.

    `make_detokenizer(request)` gives a fresh Detokenizer. `max_model_len` bounds prompt + output in tokens.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        make_detokenizer: Callable[[Request], Detokenizer],
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        max_model_len: int,
        worker_id: str,
        clock: Callable[[], float],
        grammars: Grammars,
        limits: RequestLimits = DEFAULT_LIMITS,
    ) -> None:
        self.scheduler = scheduler
        self._grammars = grammars
        self.clock = clock
        self.lives: dict[int, Live] = {}
        self.pending = StepResult()
        self._make_detokenizer = make_detokenizer
        self._eos = eos_token_ids
        self._vocab_size = vocab_size
        self._limits = limits
        self._max_model_len = max_model_len
        self._worker_id = worker_id
        self._num_arrivals = 0

    def check(self, request: Request) -> None:
        """Raises InvalidRequest when this engine can never serve the request."""
        request.params.validate(self._vocab_size, self._limits)
        if request.params.grammar:
            self._grammars.check()
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty", "prompt")
        if not self.knows(request.prompt_token_ids):
            raise InvalidRequest(f"the prompt has token ids outside 0..{self._vocab_size - 1}", "prompt")
        if not self.knows(request.replay_token_ids):
            raise InvalidRequest(f"the tokens to be replayed have ids outside 0..{self._vocab_size - 1}", "prompt")
        if len(request.replay_token_ids) > request.params.max_tokens:
            raise InvalidRequest("more tokens are to be replayed than the request may have", "max_tokens")
        if num_prompt >= self._max_model_len:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens and the context holds {self._max_model_len} with the output",
                "prompt",
            )
        kv, longest = self.scheduler.kv, self.longest(request)
        if kv.blocks_for(longest) > kv.max_sequence_blocks:
            raise InvalidRequest(
                f"prompt and output of {longest} tokens need {kv.blocks_for(longest)} KV blocks, "
                f"the pool has {kv.max_sequence_blocks}: lower max_tokens or raise worker.kv_memory_bytes",
                "max_tokens",
            )

    def knows(self, token_ids: tuple[int, ...]) -> bool:
        """Whether all of them are in the vocabulary; another one fails the step that computes it."""
        if not token_ids:
            return True
        lowest, highest = token_ids.bounds if isinstance(token_ids, PromptTokens) else (min(token_ids), max(token_ids))
        return lowest >= 0 and highest < self._vocab_size

    def longest(self, request: Request) -> int:
        """Tokens that prompt and output can have together."""
        return min(len(request.prompt_token_ids) + request.params.max_tokens, self._max_model_len)

    def arrive(self, sequence_id: int, request: Request, kind: Kind, hint: PrefixHint | None = None) -> Live:
        """A new sequence; it lives once the scheduler has taken it and it stands in `lives`. Raises InvalidRequest."""
        self.check(request)
        self._num_arrivals += 1
        sequence = Sequence(
            sequence_id=sequence_id,
            request=request,
            kind=kind,
            arrival=self._num_arrivals,
            suppressed_token_ids=(*self._eos, *request.params.stop_token_ids),
            known=list(request.replay_token_ids),
            max_output_tokens=self.longest(request) - len(request.prompt_token_ids),
            hint=hint if hint is not None and hint.peer.worker_id != self._worker_id else None,
        )
        if request.params.is_constrained and kind is not Kind.MIGRANT:
            sequence.constraint = self._grammars.begin(sequence_id, request.params)
        arrived_s, answer = self.clock(), None
        if kind is not Kind.SOURCE:
            text = OutputState(request, self._make_detokenizer(request), frozenset(self._eos), self._max_model_len)
            answer = SequenceOutputs(sequence, text, self._worker_id, arrived_s)
        return Live(sequence, answer, arrived_s)

    def drew(self, live: Live, sampled: Sampled) -> None:
        """Accounts for a drawn or replayed token; says it, when its client does not have it yet."""
        assert sampled.token_id is not None and live.answer is not None
        position = live.sequence.num_drawn
        is_new = self.scheduler.drew(live.sequence, sampled.token_id)
        output = live.answer.push(position, sampled, is_new, self.clock())
        if output is not None:
            self.pending.outputs.append((live.sequence.sequence_id, output))
            if output.finish_reason is not None:
                self.drop(live)

    def constrain(self, sequence: Sequence) -> None:
        """A sequence that came from elsewhere goes on behind the tokens it has."""
        params = sequence.request.params
        if params.is_constrained:
            sequence.constraint = self._grammars.begin(sequence.sequence_id, params, sequence.known)

    def scored(self, live: Live, scores: PromptScores) -> None:
        """Says what the tokens of a prompt scored that have been computed."""
        assert live.answer is not None
        self.pending.outputs += [(live.sequence.sequence_id, output) for output in live.answer.scored(scores)]

    def fail(self, live: Live, refusal: Refusal, message: str) -> None:
        """Ends a sequence with an error."""
        sequence = live.sequence
        self.pending.outputs.append((sequence.sequence_id, error_output(sequence.request, refusal, message)))
        self.drop(live)

    def drop(self, live: Live) -> None:
        """Ends a sequence without a word; blocks that a step still writes to are freed behind that step."""
        del self.lives[live.sequence.sequence_id]
        if live.num_running:
            self.scheduler.end(live.sequence)
        else:
            self.scheduler.finish(live.sequence)

    @property
    def has_news(self) -> bool:
        return self.pending.has_news

    def take_pending(self) -> StepResult:
        said, self.pending = self.pending, StepResult()
        return said
