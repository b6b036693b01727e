"""Every failure reaches a client as the error it expects, on every path, before or after a stream has begun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_backend import MODEL, Api, FakeBackend, Step, open_api, speak

from router.api.config import ApiConfig
from router.api.problems import REFUSALS
from workers.errors import InvalidRequest, Refusal, Refused
from workers.request import FinishReason, Output, Request

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT = {"model": MODEL.name, "messages": MESSAGES}
COMPLETION = {"model": MODEL.name, "prompt": "Hi"}


@pytest.fixture(scope="module")
def served() -> Iterator[Api]:
    with open_api(ApiConfig(max_body_bytes=8192, max_n=4, max_prompts=3, max_choices=6, offload_bytes=1024)) as api:
        yield api


@pytest.fixture
def api(served: Api) -> Api:
    served.backend.reset()
    return served


def give_up(refusal: Refusal, after: int) -> Any:
    """A script that fails with an ERROR output after so many tokens."""

    def script(backend: FakeBackend, request: Request) -> list[Step]:
        failure = Output(
            request.request_id, after, finish_reason=FinishReason.ERROR, refusal=refusal, message="given up"
        )
        return [*speak(backend, request)[:after], failure]

    return script


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert response.headers["x-should-retry"] in ("true", "false")
    error: dict[str, Any] = body["error"]
    return error


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def test_an_unknown_route_is_404_in_the_shape_of_all_errors(api: Api) -> None:
    for path in ("/nothing", "/v1", "/v1/responses/none", "//v1/models"):
        response = api.http.get(path)
        assert response.status_code == 404 and error_of(response)["code"] == "not_found"


def test_a_wrong_method_is_405_and_names_the_right_one(api: Api) -> None:
    response = api.http.get("/v1/chat/completions")
    assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"3", b'{"prompt": "\\ud800"}', b"\xff", b"[" * 4000])
def test_a_body_that_is_not_a_json_object_is_400(api: Api, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        response = api.http.post(path, content=body)
        assert response.status_code == 400 and error_of(response)["type"] == "invalid_request_error"


def test_a_body_over_the_limit_is_413_whether_or_not_it_says_its_length(api: Api) -> None:
    announced = api.http.post("/v1/completions", content=b"x" * 9000)
    assert announced.status_code == 413 and error_of(announced)["code"] == "request_too_large"
    chunked = api.http.post("/v1/completions", content=iter([b"x" * 5000, b"x" * 5000]))
    assert chunked.status_code == 413 and error_of(chunked)["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 5),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("min_tokens", 20),
        ("min_tokens", -1),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ""),
        ("stop", ["a", 3]),
        ("stop_token_ids", [MODEL.vocab_size]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(MODEL.vocab_size): 1}),
        ("logit_bias", {"5": 101}),
        ("bad_words", [""]),
        ("bad_words", [[]]),
        ("bad_words", [[MODEL.vocab_size]]),
        ("priority", 2**40),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [[]]),
        ("prompt", ["a", 3]),
        ("prompt", [1, "a"]),
        ("prompt", [True]),
        ("prompt", [-1]),
        ("prompt", [MODEL.vocab_size]),
        ("prompt", [[5], [MODEL.vocab_size]]),
        ("prompt", ["a", "b", "c", "d"]),
        ("prompt", None),
        ("prompt", {"text": "a"}),
    ],
)
def test_a_completion_field_that_cannot_be_is_400_and_named(api: Api, field: str, value: Any) -> None:
    response = api.http.post("/v1/completions", json=COMPLETION | {field: value})
    assert response.status_code == 400 and error_of(response)["param"] == field
    assert not api.backend.requests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "Hi"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "wizard", "content": "Hi"}]),
        ("messages", [{"role": "tool", "content": "Hi", "tool_call_id": "1"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
        ("top_logprobs", 2),
        ("chat_template_kwargs", {"messages": []}),
        ("max_completion_tokens", 0),
    ],
)
def test_a_chat_field_that_cannot_be_is_400_and_named(api: Api, field: str, value: Any) -> None:
    response = api.http.post("/v1/chat/completions", json=CHAT | {field: value})
    named = "max_tokens" if field == "max_completion_tokens" else field
    assert response.status_code == 400 and error_of(response)["param"] == named
    assert not api.backend.requests


def test_more_than_20_top_logprobs_is_400(api: Api) -> None:
    with pytest.raises(openai.BadRequestError):
        api.client.chat.completions.create(model=MODEL.name, messages=MESSAGES, logprobs=True, top_logprobs=21)


def test_a_missing_prompt_or_messages_is_400_and_named(api: Api) -> None:
    for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        response = api.http.post(path, json={"model": MODEL.name})
        assert response.status_code == 400 and error_of(response)["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("structured_outputs", {"choice": ["a"]}),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("use_beam_search", True),
        ("best_of", 3),
        ("continue_final_message", True),
        ("chat_template", "x"),
    ],
)
def test_what_would_change_the_answer_and_is_not_offered_is_400_and_named(api: Api, field: str, value: Any) -> None:
    response = api.http.post("/v1/chat/completions", json=CHAT | {field: value})
    assert response.status_code == 400 and error_of(response)["param"] == field


def test_best_of_and_suffix_are_400_where_they_would_mean_something(api: Api) -> None:
    for field, value in (("best_of", 2), ("suffix", "end")):
        response = api.http.post("/v1/completions", json=COMPLETION | {field: value})
        assert response.status_code == 400 and error_of(response)["param"] == field
    assert api.http.post("/v1/completions", json=COMPLETION | {"best_of": 1, "suffix": ""}).status_code == 200


def test_fields_that_change_nothing_are_accepted(api: Api) -> None:
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True}
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "stop": None, "unheard_of": 1}
    assert api.http.post("/v1/chat/completions", json=CHAT | harmless | neutral).status_code == 200


def test_an_unknown_model_is_404_and_a_missing_name_means_the_served_one(api: Api) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        api.client.chat.completions.create(model="gpt-2", messages=MESSAGES)
    assert raised.value.code == "model_not_found" and raised.value.param == "model"
    assert api.http.post("/v1/completions", json={"prompt": "Hi"}).json()["model"] == MODEL.name


def test_a_prompt_over_the_context_is_400_before_a_stream_opens(api: Api) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": [300] * MODEL.max_model_len}),
        ("/v1/completions", {"prompt": [300], "max_tokens": MODEL.max_model_len}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "7" * MODEL.max_model_len}]}),
    ):
        response = api.http.post(path, json={"model": MODEL.name, "stream": True} | body)
        assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"
        assert response.headers["content-type"] == "application/json"
    assert not api.backend.requests


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
    assert response.status_code == 503 and error_of(response)["message"] == "given up"


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
            "message": "given up",
            "type": "service_unavailable_error",
            "param": None,
            "code": Refusal.WORKER_LOST.value,
        }
    }
    assert all(choice["finish_reason"] is None for chunk in sent[:-1] for choice in chunk["choices"])


def test_an_openai_client_raises_when_its_stream_fails_midway(api: Api) -> None:
    api.backend.script = give_up(Refusal.WORKER_LOST, 2)
    with pytest.raises(openai.APIError, match="given up"):
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


def test_a_sane_request_id_is_echoed_and_any_other_replaced(api: Api) -> None:
    assert api.http.get("/health", headers={"x-request-id": "abc-1.2:3_"}).headers["x-request-id"] == "abc-1.2:3_"
    for strange in ("a b", "x" * 129, "é".encode(), ""):
        given = api.http.get("/nothing", headers={"x-request-id": strange}).headers["x-request-id"]
        assert len(given) == 32 and given.isalnum()


def test_two_requests_with_one_request_id_are_two_requests_to_the_backend(api: Api) -> None:
    for _ in range(2):
        api.http.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "same"})
    assert len({request.request_id for request in api.backend.requests}) == 2


def test_a_stream_carries_the_request_id_too(api: Api) -> None:
    headers = {"x-request-id": "mine"}
    response = api.http.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers)
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["content-type"].startswith("text/event-stream")


def test_a_long_body_is_served_like_a_short_one(api: Api) -> None:
    prompts = ["the " * 400, [400] * 500]
    for prompt in prompts:
        response = api.http.post("/v1/completions", json=COMPLETION | {"prompt": prompt, "max_tokens": 2})
        assert response.status_code == 200, response.text
    response = api.http.post("/v1/completions", json=COMPLETION | {"prompt": [5000] * 500})
    assert response.status_code == 400 and error_of(response)["param"] == "prompt"
