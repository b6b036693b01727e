"""The spans of one request hang together across router and workers, and without the package there are none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from builders import make_request
from fake_backend import CHECKPOINT, FakeBackend
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from running_workers import CONFIG, pair, running
from starlette.testclient import TestClient

from router.api.app import create_app
from router.config import ApiConfig
from workers.request import Request
from workers.status import Role, WorkerAddress
from workers.text.tokenizer import Tokenizer
from workers.tracing import NO_SPAN, clean_traceparent, start_span

TRACE = 0x0AF7651916CD43DD8448EB211C80319C
PARENT = f"00-{TRACE:032x}-b7ad6b7169203331-01"
_EXPORTER = InMemorySpanExporter()


@pytest.fixture(scope="module", autouse=True)
def provider() -> None:
    """A process has one provider for good."""
    found = TracerProvider()
    found.add_span_processor(SimpleSpanProcessor(_EXPORTER))
    trace.set_tracer_provider(found)


@pytest.fixture(autouse=True)
def exporter() -> Iterator[InMemorySpanExporter]:
    _EXPORTER.clear()
    yield _EXPORTER
    _EXPORTER.clear()


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        assert span.context is not None and span.context.trace_id == TRACE
        found.setdefault(span.name, []).append(span)
    return found


def parent_id(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def traced(**fields: object) -> Request:
    request = make_request(range(5, 205), 6)
    return Request(request.request_id, request.prompt_token_ids, request.params, traceparent=PARENT, **fields)  # type: ignore[arg-type]


async def test_queue_handoff_prefill_and_decode_are_spans_of_the_request(exporter: InMemorySpanExporter) -> None:
    async with pair() as (router, source, _):
        await router.submit(traced(), source)
        outputs = await router.finish("r")
        await router.idle()
    spans = by_name(exporter)
    assert {name: len(found) for name, found in spans.items()} == {"queue": 1, "handoff": 1, "prefill": 1, "decode": 1}
    (handoff,), (prefill,) = spans["handoff"], spans["prefill"]
    root = int("b7ad6b7169203331", 16)
    assert {parent_id(spans[name][0]) for name in ("queue", "handoff", "decode")} == {root}
    assert handoff.context is not None and parent_id(prefill) == handoff.context.span_id
    report = outputs[0].handoff
    assert report is not None and handoff.attributes is not None
    assert handoff.attributes["baton.transport"] == report.transport == "shm"
    assert handoff.attributes["baton.kv_bytes"] == report.kv_bytes
    assert handoff.attributes["baton.transfer_s"] == report.transfer_s > 0
    for span in exporter.get_finished_spans():
        assert span.start_time is not None and span.end_time is not None and span.start_time <= span.end_time


async def test_each_fault_is_a_span_that_says_how_it_was_answered(exporter: InMemorySpanExporter) -> None:
    dead = WorkerAddress("prefill-9", 1 << 32, "127.0.0.1:1")
    async with running("decode-0", Role.DECODE, CONFIG) as (_, address):
        from running_workers import Attached

        router = await Attached(address).start()
        await router.submit(traced(), dead)
        await router.finish("r")
        await router.close()
    spans = by_name(exporter)
    (handoff,) = spans["handoff"]
    assert handoff.status.status_code is StatusCode.ERROR
    assert handoff.attributes is not None and handoff.attributes["baton.recovery"] == "local"
    (prefill,) = spans["prefill"]
    assert prefill.attributes is not None and prefill.attributes["baton.worker"] == "decode-0"


def test_the_request_span_takes_its_clients_trace_and_hands_it_on(exporter: InMemorySpanExporter) -> None:
    tokenizer = Tokenizer.load(str(CHECKPOINT))
    backend = FakeBackend(tokenizer)
    app = create_app(backend, tokenizer, ApiConfig())
    client = TestClient(app, "http://127.0.0.1", client=("127.0.0.1", 50_000))
    body = {"model": "ernie", "prompt": "hello", "max_tokens": 2}
    seen: list[str] = []
    submit = backend.submit
    backend.submit = lambda request, *more: (seen.append(request.traceparent), submit(request, *more))[1]  # type: ignore[method-assign]
    assert backend.model is not None
    answer = client.post("/v1/completions", json={**body, "model": backend.model.name}, headers={"traceparent": PARENT})
    assert answer.status_code == 200
    (span,) = by_name(exporter)["request"]
    assert span.context is not None and seen == [f"00-{TRACE:032x}-{span.context.span_id:016x}-01"]
    assert span.status.status_code is not StatusCode.ERROR


@pytest.mark.parametrize("given", ["", "nonsense", "00-zz-1-01", PARENT + "x", "01" + PARENT[2:]])
def test_what_is_no_traceparent_is_not_handed_on(given: str) -> None:
    assert clean_traceparent(given) == "" and clean_traceparent(PARENT) == PARENT


def test_a_span_ends_once(exporter: InMemorySpanExporter) -> None:
    span = start_span("once", PARENT)
    span.end("broke")
    span.end()
    NO_SPAN.end()
    (found,) = exporter.get_finished_spans()
    assert found.status.status_code is StatusCode.ERROR


def test_a_span_is_as_long_as_it_took_whoever_sets_the_clock_meanwhile(exporter: InMemorySpanExporter) -> None:
    walls = iter((2 * 10**18, 10**18))
    span = start_span("x", wall_ns=lambda: next(walls))
    span.end()
    (told,) = exporter.get_finished_spans()
    assert told.start_time is not None and told.end_time is not None
    assert 2 * 10**18 <= told.start_time <= told.end_time < 2 * 10**18 + 60 * 10**9


def test_without_the_package_nothing_is_recorded_and_the_trace_is_passed_on() -> None:
    program = f"""
import sys
sys.modules["opentelemetry"] = None
from workers.text.tokenizer import Tokenizer
from workers.tracing import start_span
span = start_span("request", "{PARENT}")
span.set(tokens=1)
span.end("error")
assert span.traceparent == "{PARENT}"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
