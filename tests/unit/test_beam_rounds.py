"""Beam searches as they run, round by round: how long they may take, what they wait for, and what their rounds say of themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_backend import CHECKPOINT, Api, FakeBackend, Step, error_of
from test_api_beams import BEAMS, COMPLETION, TOKENS, small_model

from router.api.beam_requests import Searches
from router.api.beam_run import BeamOutputs
from router.api.beams import BeamPlan
from router.wishes import NO_WISHES
from workers.errors import InvariantViolated, Refusal, Refused
from workers.request import FinishReason, Output, Request, SamplingParams, end_output
from workers.text.tokenizer import Tokenizer
from workers.token_logprobs import TokenLogprob

BODY = COMPLETION | BEAMS


@pytest.mark.parametrize("timeout_s", [20.0, None])
def test_all_rounds_together_have_as_long_as_one_request(api: Api, timeout_s: float | None) -> None:
    api.backend.reset(small_model)
    whole_s = timeout_s or api.backend.request_timeout_s
    answer = api.http.post("/v1/completions", json=BODY | {"timeout": timeout_s, "ttft": 5})
    assert answer.status_code == 200, answer.text
    by_round = dict[int, set[float]]()
    for wishes in api.backend.wishes:
        by_round.setdefault(wishes.round, set()).add(wishes.timeout_s)
        assert wishes.ttft_s == (5 if wishes.round == 1 else 0), "later rounds have no first token that is waited for"
    left_s = [each for one in by_round.values() for each in one]
    assert sorted(by_round) == [1, 2, 3] and len(left_s) == 3
    assert left_s == sorted(set(left_s), reverse=True) and left_s[0] < whole_s


def test_a_search_that_is_late_is_given_up(api: Api) -> None:
    def is_late(backend: FakeBackend, request: Request) -> list[Step]:
        if len(request.prompt_token_ids) == 3:
            return small_model(backend, request)
        return [end_output(request.request_id, Refusal.DEADLINE_EXCEEDED, "not done within timeout = 0.03 s")]

    for script, timeout_s in ((small_model, 1e-9), (is_late, 20)):
        api.backend.reset(script)
        response = api.http.post("/v1/completions", json=BODY | {"timeout": timeout_s})
        assert response.status_code == 504 and f"timeout = {timeout_s:g} s" in error_of(response)["message"]


def test_a_full_queue_does_not_cost_what_is_computed_already(api: Api) -> None:
    api.backend.reset(small_model)
    undisturbed = api.http.post("/v1/completions", json=BODY).json()
    num_refused = 0

    def is_full(backend: FakeBackend, request: Request) -> list[Step]:
        nonlocal num_refused
        if len(request.prompt_token_ids) == 5 and num_refused < 3:
            num_refused += 1
            raise Refused(Refusal.QUEUE_FULL, "full", 0.001)
        return small_model(backend, request)

    api.backend.reset(is_full)
    answer = api.http.post("/v1/completions", json=BODY).json()
    assert answer["choices"] == undisturbed["choices"] and num_refused == 3

    def stays_full(backend: FakeBackend, request: Request) -> list[Step]:
        if len(request.prompt_token_ids) > 3:
            raise Refused(Refusal.QUEUE_FULL, "full", 0.001)
        return small_model(backend, request)

    api.backend.reset(stays_full)
    assert api.http.post("/v1/completions", json=BODY | {"timeout": 0.05}).status_code == 504
    api.backend.refusals = {0: Refused(Refusal.QUEUE_FULL, "full", 0.001)}
    api.backend.requests.clear()
    assert api.http.post("/v1/completions", json=BODY).status_code == 429, "nothing has been computed"


@pytest.mark.parametrize("number", [0, 1])
async def test_a_token_without_logprobs_is_an_error_and_shifts_no_others(number: int) -> None:
    def speaks(backend: FakeBackend, request: Request) -> list[Step]:
        is_silent = request.request_id.startswith(f"j-{number}-")
        steps = [step for step in small_model(backend, request) if isinstance(step, Output)]
        return [step._replace(logprobs=()) if is_silent else step for step in steps]

    tokenizer = Tokenizer.load(CHECKPOINT)
    requests = [Request(f"j-{place}-0", (5, 6, place), SamplingParams(max_tokens=2)) for place in range(2)]
    searches = Searches(BeamPlan(1, 2, frozenset()), requests)
    outputs = BeamOutputs(searches, FakeBackend(tokenizer, speaks), tokenizer, 512, NO_WISHES)
    with pytest.raises(InvariantViolated, match="logprobs"):
        await outputs.next_batch()
    assert searches.num_scores == 2, "no search has gone on"


def test_each_prompt_has_its_own_cached_tokens(api: Api) -> None:
    def tells_its_length(backend: FakeBackend, request: Request) -> list[Step]:
        steps = small_model(backend, request)
        cached = len(request.prompt_token_ids)
        return [step._replace(cached_tokens=cached) for step in steps if isinstance(step, Output)]

    api.backend.reset(tells_its_length)
    answer = api.http.post("/v1/completions", json=BODY | {"prompt": [[5, 6, 7, 8, 9], [7]], "max_tokens": 2}).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 5 + 1


@pytest.mark.parametrize("num_prompts", [1, 40])
async def test_many_beams_do_not_hold_the_event_loop(num_prompts: int) -> None:
    """Of 40 prompts the second round chooses from 640 alternatives, and 320 tokens are told in the end."""

    choosing, telling = set[int](), set[int]()

    class Alternatives(tuple[Any, ...]):
        def __iter__(self) -> Iterator[Any]:
            choosing.add(threading.get_ident())
            return super().__iter__()

    class Prompt(tuple[Any, ...]):
        def __getitem__(self, place: Any) -> Any:
            telling.add(threading.get_ident())
            return super().__getitem__(place)

    def speaks(backend: FakeBackend, request: Request) -> list[Step]:
        pairs = [(token, -1.0 - place) for place, token in enumerate(TOKENS)]
        top = Alternatives(pairs) if len(request.prompt_token_ids) == 4 else tuple(pairs)
        entry = TokenLogprob(*pairs[0], top)
        return [Output(request.request_id, 0, (entry.token_id,), "", (entry,), FinishReason.LENGTH)]

    tokenizer = Tokenizer.load(CHECKPOINT)
    params = SamplingParams(max_tokens=2)
    first = Request("j", Prompt((5, 6, 7)), params)
    requests = [replace(first, request_id=f"j-{place}-{choice}") for place in range(num_prompts) for choice in range(4)]
    searches = Searches(BeamPlan(4, 2, frozenset()), requests)
    outputs = BeamOutputs(searches, FakeBackend(tokenizer, speaks), tokenizer, 512, NO_WISHES)
    told = await outputs.next_batch()
    assert len(told) == 4 * num_prompts
    for threads in (choosing, telling):
        assert threads and (threading.get_ident() in threads) is (num_prompts == 1)
