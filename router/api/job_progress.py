"""Keeps account of what the choices of one job have become: what may be shown, what is counted, what its answer says of itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from router.api.metrics import Metrics
from router.api.problems import SENTENCES
from router.api.prompts import Prompt
from router.api.translate import Job
from router.api.turns import TurnRecorder
from router.policies.explain import Decision
from workers.errors import InvariantViolated, Refusal, Refused
from workers.request import FinishReason, HandoffReport, Output, Request, merged
from workers.token_logprobs import PromptScores
from workers.tracing import sampled_trace_id

_CONDENSED = 64
"""Outputs that are made one, where many are kept."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Choice:
    """One choice so far. `outputs` are kept only for an answer that is sent whole."""

    index: int
    prompt: Prompt
    request: Request
    outputs: list[Output]
    num_drawn: int = 0
    """Tokens the backend has sent."""
    num_tokens: int = 0
    """Tokens that count and are shown."""
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    handoff: HandoffReport | None = None
    prompt_logprobs: list[PromptScores] = field(default_factory=list)
    """Of the prompt's tokens from the second on, in order, each once."""
    is_announced: bool = False
    """Its first chunk has been sent."""
    num_condensed: int = 0
    """The first of `outputs` that are several in one."""

    def condense(self) -> None:
        """Of an answer that takes its time: many small outputs take more room than one."""
        if len(self.outputs) - self.num_condensed >= _CONDENSED:
            self.outputs[self.num_condensed :] = [merged(self.outputs[self.num_condensed :])]
            self.num_condensed += 1


class JobProgress:
    """All choices of one job; the only place that changes them. Times are seconds of one monotonic clock."""

    def __init__(
        self,
        job: Job,
        metrics: Metrics,
        now_s: float,
        decisions: Callable[[], list[Decision | None]] = list,
        traceparent: str = "",
    ) -> None:
        """`decisions`: how the choices were routed; `traceparent`: the trace that the job is an example of in the metrics."""
        trace_id = sampled_trace_id(traceparent)
        self._exemplar = {"trace_id": trace_id} if trace_id else None
        self.job = job
        self._metrics = metrics
        self._start_s = now_s
        self._decisions = decisions
        self._keep = not job.stream
        self._hides = job.hide_output
        self.choices = tuple(
            Choice(index, job.prompts[index // job.n], request, []) for index, request in enumerate(job.requests)
        )
        self._recorders = [TurnRecorder(job.turn, one.prompt_token_ids) for one in job.requests] if job.turn else None
        self.num_unfinished = len(self.choices)
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self.completion_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens found in a cache; a prompt's later choices may hit what its first one stored, so its least counts."""
        self._least_cached: dict[int, int] = {}
        metrics.running.inc()

    def accept(self, index: int, output: Output, now_s: float) -> tuple[Choice, Output]:
        """Takes the next output of a choice and returns what may be shown of it.

        Raises Refused when the output says that the request was given up, InvariantViolated for a gap or a repeat.
        """
        choice, reason, num_new = self.choices[index], output.finish_reason, len(output.token_ids)
        if reason is FinishReason.ERROR:
            refusal = output.refusal or Refusal.INTERNAL
            sentence = SENTENCES.get(refusal)
            if sentence is not None:
                request, about = choice.request, choice.request.log_fields
                _log.warning(
                    "request %s was given up: %s: %s", request.request_id, refusal, output.message, extra=about
                )
            raise Refused(refusal, sentence or output.message)
        if output.position != choice.num_drawn or choice.finish_reason is not None:
            raise InvariantViolated(f"choice {index} has {choice.num_drawn} tokens and got position {output.position}")
        if output.prompt_logprobs:
            _add_scores(choice, output.prompt_logprobs)
        choice.num_drawn += num_new
        if self._recorders is not None:
            self._recorders[index].add(output)
        if self._hides:
            reason = FinishReason.LENGTH if reason else None
            output = output._replace(token_ids=(), text="", logprobs=(), finish_reason=reason, stop_reason=None)
        if not num_new and reason is None:
            return choice, output
        if choice.first_s is None:
            choice.first_s = now_s
            self._count_cached(choice, output.cached_tokens)
            self._metrics.ttft.observe(now_s - self._start_s, self._exemplar)
        elif num_new:
            self._metrics.inter_token.observe((now_s - choice.last_s) / num_new, self._exemplar)
        choice.last_s = now_s
        if output.handoff is not None:
            choice.handoff = output.handoff
            self._metrics.observe_handoff(output.handoff)
        if num_new and not self._hides:
            choice.num_tokens += num_new
            self.completion_tokens += num_new
            self._metrics.generation_tokens.inc(num_new)
        if reason is not None:
            choice.finish_reason = reason
            self._metrics.finished.labels(reason.value).inc()
            choice.stop_reason = output.stop_reason
            self._finish(now_s)
        if self._keep:
            choice.outputs.append(output)
        return choice, output

    def _count_cached(self, choice: Choice, cached_tokens: int) -> None:
        choice.cached_tokens = cached_tokens
        place = choice.index // self.job.n
        known = self._least_cached.get(place)
        self._least_cached[place] = cached_tokens if known is None else min(known, cached_tokens)
        self.cached_tokens += self._least_cached[place] - (known or 0)

    def _finish(self, now_s: float) -> None:
        self.num_unfinished -= 1
        if self.num_unfinished == 0:
            self._metrics.running.dec()
            self._metrics.e2e.observe(now_s - self._start_s, self._exemplar)
            self._metrics.prompt_tokens.inc(self.prompt_tokens)
            self._metrics.cached_tokens.inc(self.cached_tokens)

    def shown(self) -> list[Choice]:
        """Of a finished job, the choices that its answer shows."""
        job, every = self.job, list(self.choices)
        if not job.num_best:
            return every
        prompts = [every[start : start + job.n] for start in range(0, len(every), job.n)]
        if job.beams is None:
            prompts = [sorted(own, key=_likelihood, reverse=True) for own in prompts]
        return [choice for own in prompts for choice in own[: job.num_best]]

    def go_on_to(self, num_tokens: int) -> None:
        """So many tokens were generated in all, the last of them for nobody."""
        num_new = num_tokens - self.completion_tokens
        if num_new > 0 and not self._hides:
            self.completion_tokens += num_new
            self._metrics.generation_tokens.inc(num_new)

    def abandon(self) -> None:
        """The job ends, whether or not its choices have."""
        if self.num_unfinished:
            self.num_unfinished = 0
            self._metrics.running.dec()

    def usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.job.speech.form.reasoning:
            num_reasoning = sum(choice.reasoning_tokens for choice in self.choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
        return usage

    def trace(self) -> dict[str, Any]:
        """Where each choice ran and how long the job took, as measured here; null for what is not known."""
        first = [choice.first_s for choice in self.choices if choice.first_s is not None]
        spans = [(choice.last_s - (choice.first_s or 0.0), choice.num_drawn - 1) for choice in self.choices]
        gaps = sum(count for _, count in spans if count > 0)
        decisions = self._decisions() or [None] * len(self.choices)
        routed = [None if decision is None else asdict(decision) for decision in decisions]
        return {
            "choices": [
                _trace_choice(choice) | {"routing": routing}
                for choice, routing in zip(self.choices, routed, strict=True)
            ],
            "ttft_s": min(first) - self._start_s if first else None,
            "tpot_s": sum(span for span, count in spans if count > 0) / gaps if gaps else None,
            "total_s": max(choice.last_s for choice in self.choices) - self._start_s,
        }


def _likelihood(choice: Choice) -> float:
    """The logarithm, of all tokens that were drawn."""
    return math.fsum(entry.logprob for output in choice.outputs for entry in output.logprobs)


def _add_scores(choice: Choice, parts: tuple[PromptScores, ...]) -> None:
    """Raises InvariantViolated for a gap; what a second worker says again is passed over."""
    for part in parts:
        num_known = choice.prompt_logprobs[-1].end if choice.prompt_logprobs else 1
        if part.first > num_known:
            raise InvariantViolated(f"logprobs of prompt tokens {num_known} to {part.first - 1} are missing")
        if part.end > num_known:
            choice.prompt_logprobs.append(part.part(num_known, part.end))


_HANDOFF_FIELDS = (
    "prefill_worker", "decode_worker", "transport", "kv_bytes", "transfer_s", "prefill_s", "attempts",
    "queue_s", "wait_s", "exposed_s", "resends", "degradations", "recovery",
)  # fmt: skip


def _trace_choice(choice: Choice) -> dict[str, Any]:
    report = {name: getattr(choice.handoff, name, None) for name in _HANDOFF_FIELDS}
    return {"index": choice.index, **report, "cached_tokens": choice.cached_tokens}
