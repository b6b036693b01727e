"""Log-probabilities in the forms of both endpoints, for outputs and for prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_backend import MESSAGES, MODEL, Api, FakeBackend, Step, say

from workers.limits import RequestLimits
from workers.request import Request

SAID = " the day is é"


@pytest.fixture
def api(served: Api) -> Api:
    def script(backend: FakeBackend, request: Request) -> list[Step]:
        return say(backend, request, backend.tokenizer.encode(SAID))

    served.backend.reset(script)
    return served


def complete(api: Api, **fields: Any) -> Any:
    return api.client.completions.create(**{"model": MODEL.name, "prompt": "a day", "max_tokens": 20, **fields})


def chat(api: Api, **fields: Any) -> Any:
    return api.client.chat.completions.create(model=MODEL.name, messages=MESSAGES, logprobs=True, **fields)


def names(api: Api, text: str) -> list[str]:
    return [api.backend.tokenizer.token_text(token_id) for token_id in api.backend.tokenizer.encode(text)]


def test_without_logprobs_there_are_none(api: Api) -> None:
    assert complete(api).choices[0].logprobs is None
    plain = api.client.chat.completions.create(model=MODEL.name, messages=MESSAGES)
    assert plain.choices[0].logprobs is None and api.backend.requests[-1].params.logprobs is None


def test_completions_logprobs_0_gives_dicts_of_the_drawn_token_alone(api: Api) -> None:
    logprobs = complete(api, logprobs=0).choices[0].logprobs
    assert logprobs.tokens == names(api, SAID)
    assert logprobs.top_logprobs == [{token: -1.25} for token in logprobs.tokens]
    assert api.backend.requests[-1].params.logprobs == 0


def test_completions_logprobs_k_gives_the_k_best_and_always_the_drawn_token(api: Api) -> None:
    logprobs = complete(api, logprobs=3).choices[0].logprobs
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert len(top) == 4 and top[token] == -1.25 and max(top.values()) == -0.5


def test_text_offsets_point_at_each_token_in_the_text(api: Api) -> None:
    choice = complete(api, logprobs=0).choices[0]
    assert choice.text == SAID
    assert choice.logprobs.text_offset == [0, 4, 8, 11, 12, 12]
    assert choice.logprobs.tokens[-2:] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_impossible_tokens_have_the_floor_and_never_minus_infinity(api: Api) -> None:
    for top in complete(api, logprobs=5).choices[0].logprobs.top_logprobs:
        assert min(top.values()) == -9999.0
    assert min(top.logprob for top in chat(api, top_logprobs=5).choices[0].logprobs.content[0].top_logprobs) == -9999.0


def test_chat_top_logprobs_0_or_left_out_gives_empty_lists(api: Api) -> None:
    for fields in ({}, {"top_logprobs": 0}):
        content = chat(api, **fields).choices[0].logprobs.content
        assert [entry.top_logprobs for entry in content] == [[]] * len(content)


def test_chat_logprobs_name_tokens_and_their_bytes(api: Api) -> None:
    content = chat(api, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in content] == names(api, SAID)
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == SAID
    assert all(entry.logprob == -1.25 and len(entry.top_logprobs) == 2 for entry in content)


def test_up_to_20_alternatives_are_given(api: Api) -> None:
    assert len(chat(api, top_logprobs=20).choices[0].logprobs.content[0].top_logprobs) == 20
    assert len(complete(api, logprobs=20).choices[0].logprobs.top_logprobs[0]) == 21


def test_echo_begins_with_the_prompt_whose_first_logprob_is_null(api: Api) -> None:
    choice = complete(api, echo=True, logprobs=1).choices[0]
    assert choice.text == "a day" + SAID
    assert choice.logprobs.tokens == names(api, "a day") + names(api, SAID)
    assert choice.logprobs.token_logprobs == [None] + [-1.25] * (len(choice.logprobs.tokens) - 1)
    assert choice.logprobs.top_logprobs[0] is None and len(choice.logprobs.top_logprobs[1]) == 2
    assert choice.logprobs.text_offset == [0, 1, 5, 9, 13, 16, 17, 17]


def test_echo_works_for_a_prompt_of_token_ids(api: Api) -> None:
    token_ids = api.backend.tokenizer.encode("a day")
    assert complete(api, prompt=token_ids, echo=True).choices[0].text == "a day" + SAID
    assert complete(api, prompt=token_ids, echo=True, logprobs=0).choices[0].logprobs.tokens[:2] == names(api, "a day")


def test_echo_with_max_tokens_0_scores_the_prompt_and_shows_no_output(api: Api) -> None:
    answer = complete(api, echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert choice.text == "a day" and choice.finish_reason == "length"
    assert choice.logprobs.tokens == names(api, "a day") and answer.usage.completion_tokens == 0
    assert api.backend.requests[-1].params.max_tokens == 1


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_completion_logprobs_join_to_the_whole_ones(api: Api, echo: bool) -> None:
    whole = complete(api, echo=echo, logprobs=2).choices[0].logprobs
    pieces = [chunk.choices[0].logprobs for chunk in complete(api, echo=echo, logprobs=2, stream=True) if chunk.choices]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for piece in pieces for item in getattr(piece, field)] == getattr(whole, field)


def test_streamed_chat_logprobs_join_to_the_whole_ones(api: Api) -> None:
    whole = chat(api, top_logprobs=2).choices[0].logprobs.content
    pieces = [chunk.choices[0].logprobs.content for chunk in chat(api, top_logprobs=2, stream=True)]
    assert [entry for piece in pieces for entry in piece] == whole


def test_prompt_logprobs_name_the_token_and_its_rank(api: Api) -> None:
    token_ids = api.backend.tokenizer.encode("a day")
    scores = complete(api, extra_body={"prompt_logprobs": 2}).choices[0].prompt_logprobs
    assert scores[0] is None and len(scores) == len(token_ids)
    assert scores[1][str(token_ids[1])] == {"logprob": -1.25, "rank": 7, "decoded_token": " day"}
    assert scores[1]["300"]["rank"] == 1 and len(scores[1]) == 3


def test_prompt_logprobs_of_a_chat_stand_beside_its_choices(api: Api) -> None:
    answer = api.client.chat.completions.create(
        model=MODEL.name, messages=MESSAGES, n=2, extra_body={"prompt_logprobs": 0}
    )
    assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == answer.usage.prompt_tokens
    assert not hasattr(answer.choices[0], "prompt_logprobs")


def test_prompt_logprobs_come_once_with_the_first_chunk_of_a_stream(api: Api) -> None:
    chunks = list(complete(api, stream=True, extra_body={"prompt_logprobs": 1}))
    given = [getattr(chunk.choices[0], "prompt_logprobs", "absent") for chunk in chunks]
    assert given[0] != "absent" and set(given[1:]) == {"absent"}


def test_tokens_can_be_named_by_their_ids(api: Api) -> None:
    choice = complete(api, logprobs=0, extra_body={"return_tokens_as_token_ids": True}).choices[0]
    token_ids = api.backend.tokenizer.encode(SAID)
    assert choice.logprobs.tokens == [f"token_id:{token_id}" for token_id in token_ids]


def test_all_of_a_vocabulary_is_given_where_the_workers_limit_allows_it(api: Api) -> None:
    refused = api.http.post("/v1/completions", json={"prompt": "a", "logprobs": -1})
    assert refused.status_code == 400
    assert "worker.limits.logprobs" in refused.text and f"{MODEL.vocab_size}, all of the vocabulary" in refused.text
    assert api.backend.model is not None
    api.backend.model = replace(api.backend.model, limits=RequestLimits(logprobs=2048))
    (choice,) = chat(api, top_logprobs=-1, max_tokens=4).choices
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [MODEL.vocab_size] * len(names(api, SAID))
    assert len(complete(api, logprobs=100, max_tokens=4).choices[0].logprobs.top_logprobs[0]) == 101
    (streamed,) = [chunk for chunk in complete(api, logprobs=100, max_tokens=4, stream=True)][:1]
    assert len(streamed.choices[0].logprobs.top_logprobs[0]) == 101
    scores = complete(api, extra_body={"prompt_logprobs": -1}).choices[0].prompt_logprobs
    assert scores[0] is None and all(len(score) >= MODEL.vocab_size for score in scores[1:])
    for fields in ({"max_tokens": 400}, {"max_tokens": 40, "n": 10}):
        large = api.http.post("/v1/completions", json={"prompt": "a", "logprobs": 1408, **fields})
        assert large.status_code == 400 and large.json()["error"]["param"] == "max_tokens"


def test_the_alternatives_may_be_named_by_their_ids(api: Api) -> None:
    chat(api, extra_body={"logprob_token_ids": [300, 7]})
    assert api.backend.requests[-1].params.alternatives == (300, 7)
    complete(api, extra_body={"logprob_token_ids": [7]})
    assert api.backend.requests[-1].params.alternatives == (7,), "a completion's field asks for logprobs by itself"
    for body in ({"logprob_token_ids": [7]}, {"logprob_token_ids": [MODEL.vocab_size], "logprobs": True}):
        refused = api.http.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "logprob_token_ids"
