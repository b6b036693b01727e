"""A request that cannot be served as it stands is refused with a status and a field, before anything runs."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from fake_backend import MESSAGES, MODEL, Api, error_of

from router.config import ApiConfig

API_CONFIG = ApiConfig(max_body_bytes=8192, max_n=4, max_prompts=3, max_choices=6, offload_bytes=1024)


CHAT = {"model": MODEL.name, "messages": MESSAGES}


COMPLETION = {"model": MODEL.name, "prompt": "Hi"}


def test_an_unknown_route_is_404_in_the_shape_of_all_errors(api: Api) -> None:
    for path in ("/nothing", "/v1", "/v1/embeddings", "//v1/models"):
        response = api.http.get(path)
        assert response.status_code == 404 and error_of(response)["code"] == "not_found"
        assert error_of(response)["message"].startswith("there is no /")


def test_a_wrong_method_is_405_and_names_the_right_one(api: Api) -> None:
    response = api.http.get("/v1/chat/completions")
    assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "OPTIONS, POST"


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
        ("top_p", -0.1),
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
        ("stop", [f"a{n}" for n in range(1025)]),
        ("stop_token_ids", [1] * 1025),
        ("logit_bias", {"5": 1, "05": 1}),
        ("bad_words", [[1]] * 1025),
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
        ("messages", [{"role": "system"}]),
        ("messages", [{"role": "wizard", "content": "Hi"}]),
        ("messages", [{"role": ["user"], "content": "Hi"}]),
        ("messages", [{"role": {}, "content": "Hi"}]),
        ("messages", [{"role": 5, "content": {"a": 1}}]),
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
        ("stop_regex", "a+"),
        ("lora_path", "x"),
        ("custom_logit_processor", "x"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("best_of", 129),
        ("beam_width", 2),
        ("length_penalty", 2.0),
        ("early_stopping", "never"),
        ("documents", [{"text": "x"}]),
        ("chat_template", "x"),
        ("logprob_token_ids", [5]),
        ("prompt_token_ids", [5]),
        ("web_search", {"references": []}),
    ],
)
def test_what_would_change_the_answer_and_is_not_offered_is_400_and_named(api: Api, field: str, value: Any) -> None:
    response = api.http.post("/v1/chat/completions", json=CHAT | {field: value})
    assert response.status_code == 400 and error_of(response)["param"] == field


def test_a_suffix_is_400_where_it_would_mean_something(api: Api) -> None:
    response = api.http.post("/v1/completions", json=COMPLETION | {"suffix": "end"})
    assert response.status_code == 400 and error_of(response)["param"] == "suffix"
    assert api.http.post("/v1/completions", json=COMPLETION | {"best_of": 1, "suffix": ""}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 1.0, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"stop": "x"}, "stop"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"structured_outputs": {"regex": "a"}}, "use_beam_search"),
        ({"beam_width": 5}, "beam_width"),
        ({"beam_width": 2, "n": 3}, "beam_width"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"beam_width": 4, "max_tokens": 2}, None),
    ],
)
def test_what_beams_cannot_have_is_400_and_named(api: Api, fields: dict[str, Any], param: str | None) -> None:
    response = api.http.post("/v1/completions", json=COMPLETION | {"use_beam_search": True, "max_tokens": 1} | fields)
    assert response.status_code == (400 if param else 200), response.text
    assert param is None or error_of(response)["param"] == param


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
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "7" * MODEL.max_model_len}]}),
    ):
        response = api.http.post(path, json={"model": MODEL.name, "stream": True} | body)
        assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"
        assert response.headers["content-type"] == "application/json"
    assert not api.backend.requests


def test_an_output_that_does_not_fit_is_blamed_on_max_tokens_and_not_on_the_history(api: Api) -> None:
    bodies = {"/v1/completions": {"prompt": [300] * 12}, "/v1/chat/completions": {"messages": MESSAGES}}
    for path, prompt in bodies.items():
        for is_stream in (False, True):
            response = api.http.post(path, json={**prompt, "max_tokens": MODEL.max_model_len, "stream": is_stream})
            error = error_of(response)
            assert (response.status_code, error["param"], error["code"]) == (400, "max_tokens", "invalid_value")
            assert response.headers["content-type"] == "application/json"
    assert not api.backend.requests
    for path, prompt in bodies.items():
        assert api.http.post(path, json={**prompt, "max_tokens": 500, "clamp_max_tokens": True}).status_code == 200


@pytest.mark.parametrize(("field", "value"), [("temperature", "0.5"), ("top_p", True), ("logit_bias", {"5": "x"})])
def test_what_must_be_a_number_is_called_a_number(api: Api, field: str, value: Any) -> None:
    error = error_of(api.http.post("/v1/chat/completions", json=CHAT | {field: value}))
    assert error["message"] == f"{field}: Input should be a valid number"


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
