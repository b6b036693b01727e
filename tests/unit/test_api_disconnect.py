"""When a client goes away, nothing that it asked for runs on."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_backend import MESSAGES, MODEL, Api, FakeBackend, Hang, Step, open_api, speak
from prometheus_client.parser import text_string_to_metric_families

from router.api.callers import Callers
from router.api.job_outputs import JobOutputs
from router.api.job_progress import JobProgress
from router.api.metrics import Metrics
from router.api.schema import CompletionBody, parse_body
from router.api.tenant_metrics import TenantMetrics
from router.api.translate import translate_completion
from router.api.unattended import Unattended
from router.config import ApiConfig
from router.tenants.config import TenantsConfig
from router.tenants.tenancy import Tenancy
from workers.request import Output, Request, SamplingParams


def stall(after: int) -> Any:
    def script(backend: FakeBackend, request: Request) -> list[Step]:
        steps = speak(backend, request)
        return [*steps[:after], Hang(), *steps[after:]]

    return script


def post(api: Api, path: str, body: dict[str, Any], headers: str = "") -> socket.socket:
    """A connection that has sent its request and not read the answer."""
    content = json.dumps(body).encode()
    connection = socket.create_connection((urlsplit(api.url).hostname, urlsplit(api.url).port), timeout=30)
    kind = "content-type: application/json"
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{kind}\r\ncontent-length: {len(content)}\r\n{headers}\r\n"
    connection.sendall(head.encode() + content)
    return connection


def everything_was_cancelled(backend: FakeBackend) -> bool:
    return sorted(backend.cancelled) == sorted(request.request_id for request in backend.requests)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_all_choices_of_all_prompts(api: Api, stream: bool, after: int) -> None:
    api.backend.script = stall(after)
    body = {"prompt": ["a", "b"], "n": 3, "stream": stream}
    with closing(post(api, "/v1/completions", body)):
        assert api.backend.wait_until(lambda backend: len(backend.requests) == 6)
        assert not api.backend.cancelled
    assert api.backend.wait_until(everything_was_cancelled)


def test_a_beam_search_does_not_run_on_for_a_client_that_cannot_come_back_to_it() -> None:
    with open_api(ApiConfig(client_grace_s=1000.0)) as api:
        api.backend.script = stall(0)
        body = {"prompt": ["a", "b"], "use_beam_search": True, "beam_width": 2}
        with closing(post(api, "/v1/completions", body, "idempotency-key: k\r\n")):
            assert api.backend.wait_until(lambda backend: len(backend.requests) == 2)
            assert not api.backend.cancelled
        assert api.backend.wait_until(everything_was_cancelled)


def test_closing_an_openai_stream_cancels_its_request(api: Api) -> None:
    api.backend.script = stall(3)
    stream = api.client.chat.completions.create(model=MODEL.name, messages=MESSAGES, stream=True, n=2)
    next(iter(stream))
    stream.close()
    assert api.backend.wait_until(lambda backend: len(backend.cancelled) == 2)


def test_a_choice_that_had_ended_is_not_cancelled(api: Api) -> None:
    def script(backend: FakeBackend, request: Request) -> list[Step]:
        return speak(backend, request) if request.choice_index == 0 else stall(1)(backend, request)

    api.backend.script = script
    with closing(post(api, "/v1/completions", {"prompt": "a", "n": 2, "stream": True})) as connection:
        received = b""
        while b'"finish_reason":"length"' not in received:
            received += connection.recv(4096)
    assert api.backend.wait_until(lambda backend: bool(backend.cancelled))
    assert api.backend.cancelled == [api.backend.requests[1].request_id]


def test_a_client_that_stops_reading_stops_the_reading_of_its_streams_and_leaving_frees_them(api: Api) -> None:
    """The text is larger than all buffers between, so the end is never read."""
    sent = 0

    def script(backend: FakeBackend, request: Request) -> Any:
        def steps() -> Iterator[Step]:
            nonlocal sent
            for position in range(100_000):
                sent = position
                yield Output(request.request_id, position, (300,), "x" * 10_000)

        return steps()

    api.backend.script = script
    with closing(post(api, "/v1/completions", {"prompt": "a", "stream": True})) as connection:
        assert connection.recv(100)
        assert api.backend.wait_until(lambda backend: len(backend.requests) == 1)
    assert api.backend.wait_until(everything_was_cancelled)
    assert sent < 99_999


def test_answers_that_are_read_to_the_end_cancel_nothing_and_count_as_answered() -> None:
    with open_api() as api:
        for stream in (False, True):
            for path in ("/v1/completions", "/v1/chat/completions"):
                body = {"prompt": "a", "messages": MESSAGES, "stream": stream, "n": 2}
                assert api.http.post(path, json=body).status_code == 200
        assert api.backend.cancelled == []
        families = text_string_to_metric_families(api.http.get("/metrics").text)
        counted = [sample for each in families if each.name == "baton_requests" for sample in each.samples]
        statuses = {sample.labels["status"] for sample in counted if sample.name == "baton_requests_total"}
        assert statuses == {"200"}


def test_a_client_that_goes_away_is_counted_as_such() -> None:
    with open_api() as api:
        api.backend.script = stall(1)
        with closing(post(api, "/v1/completions", {"prompt": "a"})):
            assert api.backend.wait_until(lambda backend: len(backend.requests) == 1)
        assert api.backend.wait_until(everything_was_cancelled)
        gone = 'baton_requests_total{endpoint="/v1/completions",refusal="client_disconnected",status="499"} 1.0'
        assert any(gone in api.http.get("/metrics").text for _ in range(1000))


async def test_closing_a_job_closes_all_its_streams_once(api: Api) -> None:
    requests = tuple(Request(name, (5,), SamplingParams(seed=1)) for name in ("a", "b"))
    api.backend.script = stall(1)
    generation = await JobOutputs.open(api.backend, requests)
    assert [place for place, _ in await generation.next_batch()] == [0, 1]
    generation.close()
    generation.close()
    assert api.backend.cancelled == ["a", "b"]


async def test_what_one_client_left_is_closed_when_the_next_one_leaves_even_before_it_was_followed(api: Api) -> None:
    api.backend.script = stall(1)
    metrics, unattended = Metrics(api.backend), Unattended(30.0)
    callers = Callers(Tenancy(TenantsConfig()), TenantMetrics(metrics.registry, 0, lambda: False), 256)
    job = translate_completion(
        parse_body(CompletionBody, b'{"prompt": "Hi"}'), MODEL, api.backend.tokenizer, ApiConfig()
    )
    for name in ("a", "b"):  # in one turn of the event loop
        outputs = await JobOutputs.open(api.backend, (Request(name, (5,), SamplingParams(seed=1)),))
        account = await callers.admit(job, {"path": "/v1/completions"}, goes_on=True)
        account.progress = JobProgress(job, metrics, 0.0)
        unattended.take(outputs, account.progress, account)
    for _ in range(5):
        await asyncio.sleep(0)
    assert api.backend.cancelled == ["a"]
    assert metrics.registry.get_sample_value("baton_num_requests_running") == 1.0
