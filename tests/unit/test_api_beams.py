"""The best of several choices, and the best beams: what comes back are those that are the likeliest of all, and usage counts every one."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from fake_backend import CHECKPOINT, MESSAGES, MODEL, Api, FakeBackend, Step, open_api, speak

from router.config import ApiConfig
from workers.errors import Refusal
from workers.request import FinishReason, Output, Request, end_output
from workers.text.tokenizer import Tokenizer
from workers.token_logprobs import TokenLogprob

COMPLETION = {"model": MODEL.name, "prompt": [5, 6, 7], "max_tokens": 3}
TOKENS = tuple(range(300, 304))
BEAMS = {"use_beam_search": True, "beam_width": 4, "length_penalty": 0, "early_stopping": "never", "ignore_eos": True}


def followers(before: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """The language of a small model: what may follow these tokens, the likeliest first."""
    chance = random.Random(repr(before))
    weights = [chance.random() for _ in TOKENS]
    pairs = [(token, math.log(weight / sum(weights))) for token, weight in zip(TOKENS, weights, strict=True)]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def score(tokens: tuple[int, ...], prompt: tuple[int, ...]) -> float:
    return sum(dict(followers((*prompt, *tokens[:end])))[token] for end, token in enumerate(tokens))


def small_model(backend: FakeBackend, request: Request) -> list[Step]:
    top = followers(tuple(request.prompt_token_ids))
    entry = TokenLogprob(*top[0], top)
    return [Output(request.request_id, 0, (entry.token_id,), "", (entry,), FinishReason.LENGTH, cached_tokens=2)]


def test_the_beams_are_the_likeliest_of_all_texts(api: Api) -> None:
    """Four beams of two tokens out of four leave nothing out: so the best of all sixteen texts are known."""
    api.backend.reset(small_model)
    body = (
        COMPLETION | BEAMS | {"max_tokens": 2, "n": 3, "prompt": [[5, 6], [7]], "return_token_ids": True, "logprobs": 2}
    )
    answer = api.http.post("/v1/completions", json=body).json()
    expected = []
    for prompt in ((5, 6), (7,)):
        every = sorted(itertools.product(TOKENS, repeat=2), key=lambda tokens: -score(tokens, prompt))
        expected += [(list(tokens), pytest.approx(score(tokens, prompt))) for tokens in every[:3]]
    told = [(one["token_ids"], sum(one["logprobs"]["token_logprobs"])) for one in answer["choices"]]
    assert told == expected and [one["index"] for one in answer["choices"]] == list(range(6))
    assert all(len(entry) <= 3 for one in answer["choices"] for entry in one["logprobs"]["top_logprobs"])
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 2 * 4 * 2)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4  # of the first round, of two prompts


def test_a_chat_has_beams_and_an_end_counts_as_one(api: Api) -> None:
    end = min(api.backend.tokenizer.eos_token_ids)

    def ends_soon(backend: FakeBackend, request: Request) -> list[Step]:
        pairs = [(end, -0.1), *((token, -3.0 - place) for place, token in enumerate(TOKENS))]
        entry = TokenLogprob(end, -0.1, tuple(pairs))
        return [Output(request.request_id, 0, (end,), "", (entry,), FinishReason.LENGTH)]

    api.backend.reset(ends_soon)
    body = {"messages": MESSAGES, "use_beam_search": True, "beam_width": 2, "n": 2, "max_tokens": 5}
    answer = api.http.post("/v1/chat/completions", json=body).json()
    first, second = answer["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("", "stop")
    assert (second["message"]["content"], second["finish_reason"]) == (
        api.backend.tokenizer.decode([TOKENS[0]]),
        "stop",
    )
    assert answer["usage"]["completion_tokens"] == 1 + 2


def test_a_search_that_cannot_go_on_says_why(api: Api) -> None:
    def refuses(backend: FakeBackend, request: Request) -> list[Step]:
        steps = small_model(backend, request)
        is_later = len(request.prompt_token_ids) > 4
        return [end_output(request.request_id, Refusal.WORKER_LOST, "gone")] if is_later else steps

    api.backend.reset(refuses)
    response = api.http.post("/v1/completions", json=COMPLETION | BEAMS)
    assert response.status_code == 503, response.text


def test_what_a_search_may_take_is_bounded() -> None:
    with open_api(ApiConfig(max_beam_tokens=4 * 3 * 6 - 1)) as api:
        wide = api.http.post("/v1/completions", json=COMPLETION | {"use_beam_search": True, "beam_width": 19})
        assert wide.status_code == 400 and "at most 18" in wide.json()["error"]["message"]
        response = api.http.post("/v1/completions", json=COMPLETION | BEAMS)
        assert response.status_code == 400 and response.json()["error"]["param"] == "max_tokens"
        api.backend.reset(small_model)
        assert api.http.post("/v1/completions", json=COMPLETION | BEAMS | {"max_tokens": 2}).status_code == 200
        for prompts, status in (([[5], [6]], 200), ([[5], [6], [7], [8]], 400)):  # 4 x 2 x (1 + 2) each, and 71 in all
            body = COMPLETION | BEAMS | {"max_tokens": 2, "prompt": prompts}
            assert api.http.post("/v1/completions", json=body).status_code == status
        for name in ("beam_width", "best_of"):
            response = api.http.post("/v1/completions", json=COMPLETION | {"use_beam_search": True, name: 0})
            assert response.status_code == 400 and response.json()["error"]["param"] == name


def test_the_best_of_several_are_those_that_were_likeliest(api: Api) -> None:
    def speaks_with_scores(backend: FakeBackend, request: Request) -> list[Step]:
        logprob = (-1.0, -0.2, -3.0, -0.5)[request.choice_index]
        assert request.params.logprobs is not None
        entry = TokenLogprob(0, logprob, ((0, logprob),))
        return [
            step._replace(logprobs=(entry,) * len(step.token_ids))
            for step in speak(backend, request)
            if isinstance(step, Output)
        ]

    api.backend.reset(speaks_with_scores)
    for path, prompt in (("/v1/completions", {"prompt": ["a", "b"]}), ("/v1/chat/completions", {"messages": MESSAGES})):
        body = {**prompt, "seed": 3, "max_tokens": 3}
        every = api.http.post(path, json=body | {"n": 4, "logprobs": True if "messages" in prompt else 0}).json()
        best = api.http.post(path, json=body | {"n": 2, "best_of": 4}).json()

        def texts(answer: dict[str, Any]) -> list[str]:
            return [one.get("text") or one["message"]["content"] for one in answer["choices"]]

        spoken = texts(every)
        num_prompts = len(spoken) // 4
        assert texts(best) == [spoken[4 * place + rank] for place in range(num_prompts) for rank in (1, 3)]
        assert [one["index"] for one in best["choices"]] == list(range(2 * num_prompts))
        assert all(one["logprobs"] is None for one in best["choices"])
        assert best["usage"] == every["usage"]
    refused = api.http.post("/v1/completions", json=COMPLETION | {"best_of": 2, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream"


def test_the_shipped_vocabulary_has_nothing_to_fill_in_with() -> None:
    """Why `suffix` is refused."""
    tokens = Tokenizer.load(CHECKPOINT).added_tokens
    assert not [
        token for token in tokens if any(word in token.lower() for word in ("fim", "middle", "suffix", "prefix"))
    ]
