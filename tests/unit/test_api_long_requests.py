"""Requests that are long, or too long, are read beside the event loop, and refused before the work where that is certain."""

from __future__ import annotations

from typing import Any

import pytest
from fake_backend import CHECKPOINT, MODEL, Api

from router.api.schema import MAX_VALUES
from router.api.tokenization import MAX_TOKENIZE_CHARACTERS
from router.config import ApiConfig
from workers.text.tokenizer import Tokenizer

API_CONFIG = ApiConfig(offload_bytes=512)


class Encoded:
    """Counts the texts that the served tokenizer is asked to encode, and where it is asked."""

    def __init__(self, api: Api) -> None:
        self.tokenizer, self.lengths = api.backend.tokenizer, list[int]()

    def __enter__(self) -> Encoded:
        def encode(text: str, add_special_tokens: bool = False) -> list[int]:
            self.lengths.append(len(text))
            return Tokenizer.encode(self.tokenizer, text, add_special_tokens)

        self.tokenizer.encode = encode  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc: object) -> None:
        del self.tokenizer.encode


LONG = "The sky is blue. " * 4000
assert Tokenizer.load(CHECKPOINT).least_tokens(LONG) > MODEL.max_model_len


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": ["short", LONG]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(api: Api, path: str, body: dict[str, Any]) -> None:
    with Encoded(api) as encoded:
        answer = api.http.post(path, json={"model": MODEL.name, "max_tokens": 1, **body})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert "at least" in answer.json()["error"]["message"]
    assert encoded.lengths == []


def test_an_array_of_token_ids_that_cannot_fit_is_refused_before_they_are_read(api: Api) -> None:
    answer = api.http.post("/v1/completions", json={"prompt": [-1] * MODEL.max_model_len})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/v1/completions", "/detokenize", "/tokenize"])
def test_a_body_of_too_many_values_is_refused_before_it_is_read(api: Api, path: str) -> None:
    body = b'{"prompt":[' + b"1," * MAX_VALUES + b"1, this is no JSON"
    answer = api.http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and str(MAX_VALUES) in answer.json()["error"]["message"]


def test_a_body_of_too_many_texts_is_refused_before_it_is_read(api: Api) -> None:
    body = b'{"stop":[' + b'"a",' * 400_000 + b'"a", this is no JSON'
    answer = api.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "too many texts" in answer.json()["error"]["message"]


def test_a_conversation_of_too_many_messages_is_refused(api: Api) -> None:
    body = {"messages": [{"role": "user", "content": "a"}] * 9000}
    answer = api.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "8192" in answer.json()["error"]["message"]


def test_detokenize_takes_as_many_tokens_as_the_context_and_reads_them_elsewhere(api: Api) -> None:
    token_ids = [300 + i % 900 for i in range(MODEL.max_model_len)]
    answer = api.http.post("/detokenize", json={"tokens": token_ids})
    assert answer.json() == {"prompt": api.backend.tokenizer.decode(token_ids)}
    refused = api.http.post("/detokenize", json={"tokens": [*token_ids, 300]})
    assert refused.status_code == 400 and str(MODEL.max_model_len) in refused.json()["error"]["message"]
    assert api.http.post("/detokenize", json={"tokens": [300, True]}).status_code == 400


def test_tokenize_counts_more_than_the_context_holds_but_not_without_end(api: Api) -> None:
    answer = api.http.post("/tokenize", json={"prompt": LONG}).json()
    assert answer["count"] == len(answer["tokens"]) > MODEL.max_model_len
    assert answer["tokens"] == api.backend.tokenizer.encode(LONG)
    refused = api.http.post("/tokenize", json={"prompt": "a" * (MAX_TOKENIZE_CHARACTERS + 1)})
    assert refused.status_code == 400 and str(MAX_TOKENIZE_CHARACTERS) in refused.json()["error"]["message"]
