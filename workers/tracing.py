"""Spans of a request with OpenTelemetry where it is installed (`pip install 'baton-serve[tracing]'`); without it, nothing and at no cost.

Spans hang together by W3C traceparent strings, which travel with the request (https://www.w3.org/TR/trace-context/).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

try:
    from opentelemetry import trace as _api
except ImportError:
    _api = None  # type: ignore[assignment]

_tracer = _api.get_tracer("baton") if _api is not None else None
"""Of the provider that is set, whenever it is."""
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

Value = str | int | float | bool


class Span(Protocol):
    """`traceparent` names it to its children, in this process or another."""

    @property
    def traceparent(self) -> str: ...

    def set(self, **attributes: Value) -> None: ...

    def end(self, error: str = "", at_s: float | None = None) -> None:
        """At a moment of time.monotonic, now by default. A second call does nothing."""
        ...


class _NoSpan:
    """Passes its parent on, so that spans beyond a process without tracing still hang together."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, **attributes: Value) -> None:
        pass

    def end(self, error: str = "", at_s: float | None = None) -> None:
        pass


NO_SPAN: Span = _NoSpan("")


class _Recorded:
    __slots__ = ("_has_ended", "_span", "_zero_ns", "traceparent")

    def __init__(self, span: Any, zero_ns: int) -> None:
        self._span = span
        self._zero_ns = zero_ns
        self._has_ended = False
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def set(self, **attributes: Value) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"baton.{name}", value)

    def end(self, error: str = "", at_s: float | None = None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if error:
            self._span.set_status(_api.Status(_api.StatusCode.ERROR, error))
        self._span.end(end_time=_epoch_ns(at_s, self._zero_ns))


def is_collected() -> bool:
    """Whether somebody in this process collects spans. Whoever begins to later is not seen by what has asked before."""
    return _api is not None and not isinstance(
        _api.get_tracer_provider(), (_api.ProxyTracerProvider, _api.NoOpTracerProvider)
    )


def clean_traceparent(given: str) -> str:
    """What a client sent, when it is a traceparent of the version that is understood here, else nothing."""
    return given if _TRACEPARENT.fullmatch(given) else ""


def sampled_trace_id(traceparent: str) -> str:
    """The trace's id where somebody keeps the trace (its flag says sampled), else nothing."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found is not None and int(found[3], 16) & 1 else ""


def start_span(
    name: str,
    parent: str = "",
    at_s: float | None = None,
    attributes: Mapping[str, Any] | None = None,
    wall_ns: Callable[[], int] = time.time_ns,
) -> Span:
    """A span below `parent` (a traceparent; "" or nonsense: a trace of its own) that began at `at_s` of time.monotonic.

    Where nobody collects spans, one that only passes its parent on.
    """
    if _tracer is None:
        return _NoSpan(parent)
    named = {f"baton.{key}": value for key, value in (attributes or {}).items()}
    zero_ns = wall_ns() - time.monotonic_ns()
    start_ns = _epoch_ns(at_s, zero_ns)
    span = _tracer.start_span(name, _context(parent), attributes=named, start_time=start_ns)
    return _Recorded(span, zero_ns) if span.is_recording() else _NoSpan(parent)


def _context(parent: str) -> Any:
    found = _TRACEPARENT.fullmatch(parent)
    if found is None:
        return _api.set_span_in_context(_api.INVALID_SPAN)
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    context = _api.SpanContext(trace_id, span_id, is_remote=True, trace_flags=_api.TraceFlags(flags))
    return _api.set_span_in_context(_api.NonRecordingSpan(context))


def _epoch_ns(at_s: float | None, zero_ns: int) -> int:
    """The API counts from 1970; everything else here uses the clock that does not jump. `zero_ns`: the time of day, as the span's
    start saw it, at which that clock began; so a span is as long as it took, whoever sets the time of day meanwhile."""
    return zero_ns + (time.monotonic_ns() if at_s is None else int(at_s * 1e9))
