"""The spans of a worker's requests: an Observer of its core. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.messages import Prefilled
from workers.handoff.protocol.choices import RecoveryChoice
from workers.handoff.protocol.messages import Handoff, HandoffFailed
from workers.request import Output
from workers.tracing import NO_SPAN, Span, start_span


@dataclass(slots=True)
class _Trace:
    traceparent: str
    submitted_s: float
    decode: Span = NO_SPAN
    num_tokens: int = 0


class RequestTraces:
    """By sequence id. `now` and all times are of time.monotonic, which spans go by. Ids that are not known are ignored."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._requests: dict[int, _Trace] = {}
        self._handoffs: dict[int, Span] = {}
        self._prefills: dict[int, Span] = {}

    def submitted(self, sequence_id: int, traceparent: str, now: float) -> None:
        self._requests[sequence_id] = _Trace(traceparent, now)

    def said(self, sequence_id: int, output: Output, now: float) -> None:
        """The first output tells where the time went; the last one ends the story."""
        trace = self._requests.get(sequence_id)
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
            self._end(sequence_id, output.message)

    def cancelled(self, sequence_id: int) -> None:
        self._end(sequence_id, "cancelled")

    def _end(self, sequence_id: int, error: str) -> None:
        trace = self._requests.pop(sequence_id, None)
        if trace is not None:
            trace.decode.end(error)

    # ---- prompts that others compute ----

    def handoff_begun(self, sequence_id: int, traceparent: str, source: str, attempt: int) -> str:
        attributes = {"source": source, "target": self._worker_id, "attempt": attempt}
        span = self._handoffs[sequence_id] = start_span("handoff", traceparent, attributes=attributes)
        return span.traceparent

    def handoff_ended(
        self, sequence_id: int, outcome: Handoff | HandoffFailed | None, choice: RecoveryChoice | None
    ) -> None:
        span = self._handoffs.pop(sequence_id, NO_SPAN)
        if choice is not None:
            span.set(recovery=choice.recovery.value, expected_s=choice.expected_s, fits=choice.fits)
        if isinstance(outcome, Handoff):
            span.set(
                transport=outcome.transport,
                kv_bytes=outcome.kv_bytes,
                transfer_s=outcome.transfer_s,
                wait_s=outcome.wait_s,
                exposed_s=outcome.exposed_s,
                resends=outcome.resends,
                degradations=outcome.degradations,
            )
            span.end()
        else:
            span.end("cancelled" if outcome is None else str(outcome))

    # ---- prompts that are computed for others ----

    def prefill_begun(self, sequence_id: int, traceparent: str) -> None:
        self._prefills[sequence_id] = start_span("prefill", traceparent)

    def prefill_computed(self, prefilled: Prefilled) -> None:
        span = self._prefills.get(prefilled.sequence_id, NO_SPAN)
        span.set(cached_tokens=prefilled.cached_tokens, prefill_s=prefilled.prefill_s)
        span.end()

    def prefill_ended(self, sequence_id: int, reason: str) -> None:
        self._prefills.pop(sequence_id, NO_SPAN).end(reason)
