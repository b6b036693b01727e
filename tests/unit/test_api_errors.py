"""Every failure reaches a client as the error it expects, on every path, before or after a stream has begun."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_backend import MESSAGES, MODEL, Api, FakeBackend, Step, error_of, speak

from router.api.problems import REFUSALS, SENTENCES
from router.config import ApiConfig
from workers.errors import InvalidRequest, Refusal, Refused
from workers.request import FinishReason, Output, Request

API_CONFIG = ApiConfig(max_body_bytes=8192, max_n=4, max_prompts=3, max_choices=6, offload_bytes=1024)


CHAT = {"model": MODEL.name, "messages": MESSAGES}


COMPLETION = {"model": MODEL.name, "prompt": "Hi"}


def give_up(refusal: Refusal, after: int) -> Any:
    """A script that fails with an ERROR output after so many tokens."""

    def script(backend: FakeBackend, request: Request) -> list[Step]:
        failure = Output(
            request.request_id, after, finish_reason=FinishReason.ERROR, refusal=refusal, message="given up"
        )
        return [*speak(backend, request)[:after], failure]

    return script


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def test_every_refusal_has_its_status_and_says_whether_to_retry(api: Api) -> None:
    assert set(REFUSALS) == set(Refusal)
    for refusal, row in REFUSALS.items():
        for stream in (False, True):
            api.backend.reset()
            api.backend.refusals = {0: Refused(refusal, "not now")}
            response = api.http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert response.status_code == row.status and error_of(response)["code"] == refusal.value
            assert response.headers["x-should-retry"] == ("true" if row.retry else "false")


def test_a_full_queue_is_429_with_retry_after_as_long_as_the_backend_says(api: Api) -> None:
    api.backend.refusals = {0: Refused(Refusal.QUEUE_FULL, "full", retry_after_s=6.2)}
    with pytest.raises(openai.RateLimitError) as raised:
        api.client.completions.create(model=MODEL.name, prompt="Hi")
    assert raised.value.response.headers["retry-after"] == "7"


def test_a_refusal_of_one_choice_closes_the_others(api: Api) -> None:
    api.backend.refusals = {2: Refused(Refusal.QUEUE_FULL, "full")}
    assert api.http.post("/v1/completions", json=COMPLETION | {"n": 4}).status_code == 429
    assert api.backend.cancelled == [request.request_id for request in api.backend.requests]
    assert len(api.backend.cancelled) == 2


def test_invalid_for_the_backend_is_invalid_for_the_client(api: Api) -> None:
    api.backend.refusals = {0: InvalidRequest("no such bias", "logit_bias")}
    response = api.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 400 and error_of(response)["param"] == "logit_bias"


@pytest.mark.parametrize("after", [0, 2])
def test_a_whole_answer_that_fails_on_the_way_has_the_status_of_its_reason(api: Api, after: int) -> None:
    api.backend.script = give_up(Refusal.WORKER_LOST, after)
    response = api.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503 and error_of(response)["message"] == SENTENCES[Refusal.WORKER_LOST]


def test_a_stream_that_fails_before_its_first_token_has_the_status_of_its_reason(api: Api) -> None:
    api.backend.script = give_up(Refusal.DEADLINE_EXCEEDED, 0)
    response = api.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.status_code == 504 and error_of(response)["code"] == "deadline_exceeded"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_that_fails_midway_sends_an_error_event_and_then_done(api: Api, path: str) -> None:
    api.backend.script = give_up(Refusal.WORKER_LOST, 2)
    sent = events(api.http.post(path, json=CHAT | COMPLETION | {"stream": True}).text)
    assert sent[-1] == {
        "error": {
            "message": SENTENCES[Refusal.WORKER_LOST],
            "type": "service_unavailable_error",
            "param": None,
            "code": Refusal.WORKER_LOST.value,
        }
    }
    assert all(choice["finish_reason"] is None for chunk in sent[:-1] for choice in chunk["choices"])


@pytest.mark.parametrize("refusal", sorted(SENTENCES))
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_worker_says_of_its_inside_goes_to_the_log_and_not_to_the_client(
    api: Api, caplog: pytest.LogCaptureFixture, refusal: Refusal, stream: bool
) -> None:
    inside = "lost worker decode-1: 10.0.0.5:4433: the model failed: CUDA error"

    def script(backend: FakeBackend, request: Request) -> list[Step]:
        (failure,) = give_up(refusal, 0)(backend, request)
        return [speak(backend, request)[0], failure._replace(message=inside)]

    api.backend.script = script
    answer = api.http.post("/v1/chat/completions", json=CHAT | {"stream": stream}).text
    assert SENTENCES[refusal] in answer
    assert not [word for word in ("decode-1", "10.0.0.5", "CUDA") if word in answer]
    assert any(inside in record.getMessage() for record in caplog.records)


def test_an_openai_client_raises_when_its_stream_fails_midway(api: Api) -> None:
    api.backend.script = give_up(Refusal.WORKER_LOST, 2)
    with pytest.raises(openai.APIError, match=SENTENCES[Refusal.WORKER_LOST]):
        list(api.client.chat.completions.create(model=MODEL.name, messages=MESSAGES, stream=True))


def test_one_choice_that_fails_ends_its_siblings(api: Api) -> None:
    def script(backend: FakeBackend, request: Request) -> list[Step]:
        failing = give_up(Refusal.WORKER_LOST, 3)(backend, request)
        return failing if request.choice_index == 1 else speak(backend, request)

    api.backend.script = script
    response = api.http.post("/v1/chat/completions", json=CHAT | {"n": 2, "max_tokens": 400, "stream": True})
    assert "error" in events(response.text)[-1]
    assert api.backend.cancelled == [api.backend.requests[0].request_id]


def break_order(backend: FakeBackend, request: Request) -> list[Step]:
    steps = speak(backend, request)
    return [steps[0], steps[2]]


def end_early(backend: FakeBackend, request: Request) -> list[Step]:
    return speak(backend, request)[:2]


def crash(backend: FakeBackend, request: Request) -> list[Step]:
    return [speak(backend, request)[0], RuntimeError("a secret of ours")]


@pytest.mark.parametrize("script", [break_order, end_early, crash])
def test_a_backend_that_breaks_its_promise_is_an_internal_error_that_tells_nothing_and_forbids_a_retry(
    api: Api, script: Any
) -> None:
    api.backend.script = script
    response = api.http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 500 and error_of(response)["message"] == "internal error"
    assert response.headers["x-should-retry"] == "false"
    sent = events(api.http.post("/v1/completions", json=COMPLETION | {"stream": True}).text)
    assert sent[-1]["error"]["message"] == "internal error"


def test_before_a_worker_has_reported_requests_are_503(api: Api) -> None:
    api.backend.model = None
    response = api.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503 and error_of(response)["code"] == "no_workers"
