"""Whatever a body says, the answer is an answer or an error of the caller's in the shape of all errors: never 500, never silence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from fake_backend import MODEL, Api, error_of, open_api
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.api.admin_schema import DrainBody, PinBody, RoleBody
from router.api.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from router.config import ApiConfig

BODIES = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/admin/workers/decode-0/role": RoleBody,
    "/admin/workers/decode-0/drain": DrainBody,
    "/admin/workers/decode-0/pin": PinBody,
}
GOOD = {
    "prompt": "Hi",
    "messages": [{"role": "user", "content": "Hi"}],
    "tokens": [5],
    "role": "mixed",
    "max_tokens": 3,
}
EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "250"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = (
    st.integers() | st.integers(-3, 30) | st.floats() | st.sampled_from([2**31, 2**63, 2**64, 10**30, -0.0, 1e308])
)
TEXTS = st.text(max_size=12) | st.sampled_from(["user", "text", "<s>", "\ud800", "\x00", "auto", "{{ 1 }}", "5", "05"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | VALUES, "content": TEXTS | VALUES},
        optional={"name": VALUES, "tool_calls": VALUES, "tool_call_id": VALUES},
    ),
    max_size=4,
)


@st.composite
def bodies(draw: st.DrawFn, kind: Any) -> dict[str, Any]:
    """Some fields as they should be, so that the others are looked at, and some as they come."""
    fields = draw(st.lists(st.sampled_from([*kind.model_fields, "response_format", "user", "logit_bias"]), max_size=4))
    body = {name: value for name, value in GOOD.items() if name in kind.model_fields and name != "messages"}
    if kind is TokenizeBody:
        body.pop("prompt")
    if "messages" in kind.model_fields:
        body["messages"] = draw(MESSAGES) if draw(st.booleans()) else GOOD["messages"]
    return body | {name: draw(VALUES) for name in fields}


@pytest.fixture(scope="module")
def small() -> Iterator[Api]:
    with open_api(ApiConfig(max_n=4, max_prompts=4, max_choices=8, offload_bytes=256)) as api:
        yield api


def check(api: Api, path: str, content: bytes) -> None:
    response = api.http.post(path, content=content)
    if response.status_code == 200:
        assert "internal error" not in response.text
        return
    assert response.status_code in (400, 404), (response.status_code, response.text, content)
    assert len(error_of(response)["message"]) < 2000


@pytest.mark.parametrize("path", BODIES)
def test_any_value_in_any_field_is_answered_or_refused(small: Api, path: str) -> None:
    @SETTINGS
    @given(body=bodies(BODIES[path]))
    def fuzz(body: dict[str, Any]) -> None:
        small.backend.reset()
        check(small, path, json.dumps(body).encode())

    fuzz()


@settings(SETTINGS, max_examples=EXAMPLES * 3 // 5)
@given(
    content=st.binary(max_size=80) | st.from_regex(rb'\{"(prompt|messages|n)":[\[\]{}",:0-9a-z\\ ]*\}', fullmatch=True)
)
def test_any_bytes_are_answered_or_refused(small: Api, content: bytes) -> None:
    for path in BODIES:
        check(small, path, content)


@settings(SETTINGS, max_examples=EXAMPLES * 3 // 5)
@given(data=st.data())
def test_a_body_with_any_bytes_changed_is_answered_or_refused(small: Api, data: st.DataObject) -> None:
    whole = bytearray(json.dumps({**GOOD, "model": MODEL.name, "stop": ["a"], "logit_bias": {"5": 1}, "n": 2}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        check(small, path, bytes(whole))
