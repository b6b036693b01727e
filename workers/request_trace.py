"""What a worker remembers of a request's times: its spans, and how long it may still take. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from workers.client import Submit
from workers.request import Output
from workers.tracing import NO_SPAN, Span, start_span


@dataclass(slots=True)
class _Trace:
    traceparent: str
    submitted_s: float
    deadline_s: float
    decode: Span = NO_SPAN
    num_tokens: int = 0


class RequestTraces:
    """The requests of one worker, by sequence id. `now` and all times are of time.monotonic, which spans go by."""

    def __init__(self) -> None:
        self._traces: dict[int, _Trace] = {}

    def submitted(self, sequence_id: int, submit: Submit, now: float) -> None:
        bounds = [now + left_s for left_s in (submit.remaining_s, submit.first_token_s) if left_s > 0]
        self._traces[sequence_id] = _Trace(submit.request.traceparent, now, min(bounds, default=inf))

    def deadline_s(self, sequence_id: int) -> float:
        """When its first token is due; infinity when nobody said."""
        trace = self._traces.get(sequence_id)
        return inf if trace is None else trace.deadline_s

    def said(self, sequence_id: int, output: Output, now: float) -> None:
        """The first output tells where the time went; the last one ends the story."""
        trace = self._traces.get(sequence_id)
        if trace is None:
            return
        report = output.handoff
        if report is not None:
            admitted_s = trace.submitted_s + report.queue_s
            start_span("queue", trace.traceparent, trace.submitted_s).end(at_s=admitted_s)
            if report.transport == "local":
                attributes = {"worker": report.decode_worker, "attempts": report.attempts, "recovery": report.recovery}
                start_span("prefill", trace.traceparent, now - report.prefill_s, attributes).end()
            trace.decode = start_span("decode", trace.traceparent, attributes={"worker": report.decode_worker})
        trace.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            trace.decode.set(tokens=trace.num_tokens)
            self.ended(sequence_id, output.message)

    def ended(self, sequence_id: int, error: str = "") -> None:
        """Nobody waits for it any more; unknown ids are ignored."""
        trace = self._traces.pop(sequence_id, None)
        if trace is not None:
            trace.decode.end(error)
