"""Runs the requests of one job together, and keeps account of what its choices have become."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from router.api.metrics import Metrics
from router.api.problems import SENTENCES
from router.api.prompts import Prompt
from router.api.translate import Job
from router.api.turns import TurnRecorder
from router.backend import Backend, OutputStream
from router.job_part import NO_JOB, JobPart
from router.policies.explain import Decision
from router.wishes import NO_WISHES, Wishes
from workers.errors import InvariantViolated, Refusal, Refused
from workers.request import FinishReason, HandoffReport, Output, PromptScores, Request, merged
from workers.tracing import sampled_trace_id

T = TypeVar("T")

_CONDENSED = 64
"""Outputs that are made one, where many are kept."""
_SUBMITS_AT_ONCE = 8
"""Each takes the event loop for some 0.2 ms."""


class JobOutputs:
    """The output streams of one job. What is not read waits in the streams, which bound it. Used by one task."""

    def __init__(self, streams: list[OutputStream], heartbeat_s: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams = streams
        self._wakes = [partial(self._wake, place) for place in range(len(streams))]
        self._positions = [0] * len(streams)
        self._num_open = len(streams)
        self._ready = list(range(len(streams)))
        """Streams that may have something."""
        self._reader: asyncio.Future[None] | None = None
        self._show: Callable[[int, Output], bool] | None = None
        """Set while `next_batch` waits, where its caller gave one."""
        self._not_shown: list[tuple[int, Output]] = []
        self._failure: Exception | None = None
        """What `show`, or a stream, raised where an output came."""
        self._heartbeat_s = heartbeat_s
        self._written_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.is_heartbeat_due = False
        """Nothing was written for as long as a heartbeat's interval."""
        self.is_broken = False
        """A request was given up: it has ended, but has not run to its end."""
        self._watch_silence()

    @classmethod
    async def open(
        cls,
        backend: Backend,
        requests: tuple[Request, ...],
        heartbeat_s: float | None = None,
        wishes: Wishes = NO_WISHES,
        parts: Sequence[JobPart] = (),
    ) -> JobOutputs:
        """Submits every request, each as its part of the job; when one is refused, those before it are closed and the refusal is raised.

        Others have a turn between a few of them: a job may have thousands.
        """
        streams: list[OutputStream] = []
        try:
            for number, (request, part) in enumerate(zip(requests, parts or repeat(NO_JOB), strict=False), 1):
                streams.append(backend.submit(request, wishes, part))
                if number % _SUBMITS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(streams, heartbeat_s)

    def decisions(self) -> list[Decision | None]:
        """How each request was routed, as far as that was asked for."""
        return [stream.decision for stream in self._streams]

    async def next_batch(self, show: Callable[[int, Output], bool] | None = None) -> list[tuple[int, Output]]:
        """Waits for an output, then takes all there are; empty when only a heartbeat is due. Raises a stream's failure.

        With `show` an output that comes during the wait is given to it where it came, which costs no change of tasks. Once
        `show` returns False for one, that output and all that follow are returned from here; what it raises is raised here.
        """
        while True:
            batch, self._not_shown = self._not_shown, []
            if self._ready:
                ready, self._ready = self._ready, []
                for place in ready:
                    output = self._streams[place].take(self._wakes[place])
                    if output is not None:
                        self._note(place, output)
                        batch.append((place, output))
            if batch or self.is_heartbeat_due:
                return batch
            reader = self._reader = self._loop.create_future()
            self._show = show
            try:
                await reader
            finally:
                self._show = None
            if self._failure is not None:
                raise self._failure

    def wrote(self) -> None:
        """Something has gone out to the client: silence begins anew. An output that shows nothing does not end it."""
        self.is_heartbeat_due = False
        self._written_s = self._loop.time()

    def _note(self, place: int, output: Output) -> None:
        if output.finish_reason is FinishReason.ERROR:  # it says nothing of how far its request has come
            self.is_broken = True
        else:
            self._positions[place] = output.position + len(output.token_ids)
        if output.finish_reason is not None:
            self._num_open -= 1

    @property
    def has_ended(self) -> bool:
        """The end of every request has been taken."""
        return not self._num_open

    @property
    def num_tokens(self) -> int:
        """That were taken, of all requests."""
        return sum(self._positions)

    def close(self) -> None:
        """Closes every stream; once is enough."""
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams:
            stream.close()

    def _wake(self, place: int) -> None:
        show = self._show
        if show is None:
            self._ready.append(place)
            self._rouse()
            return
        try:
            output = self._streams[place].take(self._wakes[place])
            if output is None:
                return
            self._note(place, output)
            if show(place, output):
                return
            self._not_shown.append((place, output))
        except Exception as error:  # whose output came has nothing to do with it
            self._failure = error  # not the future's: that takes no StopIteration, and nobody would be roused
        self._rouse()

    def _rouse(self) -> None:
        self._show, reader = None, self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _watch_silence(self) -> None:
        """One timer per interval and job, not per output: it only looks when something was last written."""
        if self._heartbeat_s is None:
            return
        left_s = self._written_s + self._heartbeat_s - self._loop.time()
        if left_s <= 0:
            self.is_heartbeat_due = True
            self._rouse()
            left_s = self._heartbeat_s
        self._timer = self._loop.call_later(left_s, self._watch_silence)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T], is_sent: Callable[[], bool]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away. Raises ClientDisconnect then.

    Servers report a disconnect also when an answer is complete: with `is_sent` true the work may end in peace.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not is_sent():
            raise ClientDisconnect
        return await task
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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
