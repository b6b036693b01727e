"""The sequences of one engine from arrival to end, and what is to be said of them; knows no runner, no steps and no other workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.engine.outputs import Answer
from workers.engine.results import StepResult
from workers.errors import InvalidRequest, Refusal
from workers.prompt_scores import PromptScores
from workers.request import Request, error_output
from workers.runner import Sampled
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Kind, Sequence
from workers.status import PrefixHint
from workers.text.output import Detokenizer, OutputState


@dataclass(slots=True, eq=False)
class Live:
    """A sequence, and what the scheduler need not know of it."""

    sequence: Sequence
    answer: Answer | None
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


class Roster:
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
    ) -> None:
        self.scheduler = scheduler
        self.clock = clock
        self.lives: dict[int, Live] = {}
        self.said = StepResult()
        self._make_detokenizer = make_detokenizer
        self._eos = eos_token_ids
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._worker_id = worker_id
        self._num_arrivals = 0

    def check(self, request: Request) -> None:
        """Raises InvalidRequest when this engine can never serve the request."""
        request.params.validate(self._vocab_size)
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty", "prompt")
        if not self.knows(request.prompt_token_ids):
            raise InvalidRequest(f"the prompt has token ids outside 0..{self._vocab_size - 1}", "prompt")
        if not self.knows(request.replay_token_ids):
            raise InvalidRequest(f"the tokens to be replayed have ids outside 0..{self._vocab_size - 1}", "prompt")
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
        return not token_ids or (min(token_ids) >= 0 and max(token_ids) < self._vocab_size)

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
        arrived_s, answer = self.clock(), None
        if kind is not Kind.SOURCE:
            text = OutputState(request, self._make_detokenizer(request), frozenset(self._eos), self._max_model_len)
            answer = Answer(sequence, text, self._worker_id, arrived_s)
        return Live(sequence, answer, arrived_s)

    def drew(self, live: Live, sampled: Sampled) -> None:
        """Accounts for a drawn or replayed token; says it, when its client does not have it yet."""
        assert sampled.token_id is not None and live.answer is not None
        position = live.sequence.num_drawn
        is_new = self.scheduler.drew(live.sequence, sampled.token_id)
        output = live.answer.push(position, sampled, is_new, self.clock())
        if output is not None:
            self.said.outputs.append((live.sequence.sequence_id, output))
            if output.finish_reason is not None:
                self.drop(live)

    def scored(self, live: Live, scores: PromptScores) -> None:
        """Says what the tokens of a prompt scored that have been computed."""
        assert live.answer is not None
        self.said.outputs += [(live.sequence.sequence_id, output) for output in live.answer.scored(scores)]

    def fail(self, live: Live, refusal: Refusal, message: str) -> None:
        """Ends a sequence with an error."""
        sequence = live.sequence
        self.said.outputs.append((sequence.sequence_id, error_output(sequence.request, refusal, message)))
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
        return self.said != StepResult()

    def take_said(self) -> StepResult:
        said, self.said = self.said, StepResult()
        return said
