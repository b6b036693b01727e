"""Any router tells the rest of a stream, to the byte, from whichever event a client has come to, and a request that is sent again is not computed again."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import CHECKPOINT, Hang, error_of, serve
from keeping_backend import KeepingBackend
from test_api_tools import ANSWER, ASK, CALLS, TOOLS, says

from router.api.naming import Naming
from router.api.retelling import BITE, Retelling
from router.api.tickets import Ticket
from router.config import ApiConfig
from workers.request import Output, Request, SamplingParams
from workers.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def routers(thinking_folder: Path) -> Iterator[tuple[KeepingBackend, list[httpx.Client]]]:
    """Two routers over the same workers."""
    backend = KeepingBackend(Tokenizer.load(thinking_folder))
    with serve(backend) as first, serve(backend) as second:
        clients = [
            httpx.Client(base_url=url, timeout=30, headers={"authorization": "Bearer k"}) for url in (first, second)
        ]
        yield backend, clients
        for client in clients:
            client.close()


@pytest.fixture
def two(routers: tuple[KeepingBackend, list[httpx.Client]]) -> tuple[KeepingBackend, httpx.Client, httpx.Client]:
    backend, (first, second) = routers
    backend.reset()
    return backend, first, second


def events(text: str) -> list[str]:
    return [f"{event}\n\n" for event in text.split("\n\n")[:-1]]


def id_of(event: str) -> str:
    found = re.match(r"id: (\S+)\n", event)
    assert found is not None, event
    return found[1]


CHAT = {"messages": ASK, "stream": True, "max_tokens": 30}
STREAMS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "plain": ("/v1/chat/completions", CHAT, None),
    "usage": ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, None),
    "logprobs": ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}, None),
    "tools": ("/v1/chat/completions", CHAT | {"tools": TOOLS}, says(CALLS)),
    "reasoning": ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}, says(ANSWER)),
    "completion": ("/v1/completions", {"prompt": "Hi", "stream": True, "max_tokens": 30, "echo": True, "logprobs": 2}, None),
    "response": ("/v1/responses", {"input": "Hi", "stream": True, "max_output_tokens": 30}, says(ANSWER)),
    "response_tools": ("/v1/responses", {"input": "Hi", "stream": True, "tools": [{"type": "function", **TOOLS[0]["function"]}]}, says(CALLS)),
    "message": ("/v1/messages", {"messages": ASK, "stream": True, "max_tokens": 30}, says(CALLS)),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_the_rest_of_a_stream_is_the_same_to_the_byte_on_any_router(two: Any, name: str) -> None:
    backend, first, second = two
    path, body, script = STREAMS[name]
    if script is not None:
        backend.script = script
    whole = first.post(path, json=body).text
    told = events(whole)
    assert len(told) > 10
    job = next(iter(backend.tickets))
    for place, event in enumerate(told):
        rest = second.get(f"/v1/requests/{job}/stream", params={"after": id_of(event)})
        assert rest.text == "".join(told[place + 1 :]), event
    header = second.get(f"/v1/requests/{job}/stream", headers={"last-event-id": id_of(told[2])})
    assert header.text == "".join(told[3:])
    assert second.get(f"/v1/requests/{job}/stream").text == whole
    assert all(part.at == "decode-0" for part in backend.parts[1:])


def test_an_answer_that_went_on_from_a_remembered_turn_is_the_same_on_a_router_that_remembers_none() -> None:
    backend = KeepingBackend(Tokenizer.load(CHECKPOINT))
    with (
        serve(backend, ApiConfig(turn_memory_bytes=1 << 20)) as first,
        serve(backend) as second,
        httpx.Client(timeout=30) as http,
    ):
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, "return_token_ids": True}
        turn = http.post(f"{first}/v1/chat/completions", json=body).json()
        known = [*turn["prompt_token_ids"], *turn["choices"][0]["token_ids"]]
        history = [*body["messages"], turn["choices"][0]["message"], {"role": "user", "content": "And then?"}]
        asked = CHAT | {"messages": history, "stream_options": {"include_usage": True}}
        backend.reset()
        told = events(http.post(f"{first}/v1/chat/completions", json=asked).text)
        assert list(backend.requests[-1].prompt_token_ids[: len(known)]) == known, "it went on from the turn"
        (job,) = backend.tickets
        for place in (0, 7, len(told) - 2):
            rest = http.get(f"{second}/v1/requests/{job}/stream", params={"after": id_of(told[place])})
            assert rest.text == "".join(told[place + 1 :]), "the usage counts the same prompt"
        prompts = {request.prompt_token_ids for request in backend.requests}
        assert len(backend.requests) == 4 and len(prompts) == 1, "whoever has to compute it again computes the same"


def by_choice(told: list[str]) -> dict[int, list[str]]:
    said: dict[int, list[str]] = {}
    for event in told:
        _, _, data = event.partition("data: ")
        for choice in json.loads(data)["choices"] if data.startswith("{") else ():
            said.setdefault(choice["index"], []).append(json.dumps(choice))
    return said


def test_each_choice_goes_on_where_the_client_has_come_to(two: Any) -> None:
    backend, first, second = two
    body = {"prompt": ["Hi", "Ho"], "n": 2, "stream": True, "max_tokens": 9, "stream_options": {"include_usage": True}}
    told = events(first.post("/v1/completions", json=body).text)
    whole, job = by_choice(told), next(iter(backend.tickets))
    assert len(whole) == 4
    for place, event in enumerate(told):
        rest = events(second.get(f"/v1/requests/{job}/stream", params={"after": id_of(event)}).text)
        had, more = by_choice(told[: place + 1]), by_choice(rest)
        assert {index: had.get(index, []) + more.get(index, []) for index in whole} == whole
        assert rest[-1:] == told[-1:] or place == len(told) - 1


def test_a_request_that_is_sent_again_is_answered_by_what_runs_or_has_run(two: Any) -> None:
    backend, first, second = two
    headers = {"idempotency-key": "one", "x-baton-created": "1700000000"}
    answers = [client.post("/v1/chat/completions", json=CHAT, headers=headers) for client in (first, second)]
    assert answers[0].text == answers[1].text and '"created":1700000000' in answers[0].text
    assert [part.at for part in backend.parts] == ["", "decode-0"]
    whole = {"messages": ASK, "max_tokens": 30}
    headers = {"idempotency-key": "two"}
    answers = [client.post("/v1/chat/completions", json=whole, headers=headers) for client in (first, second)]
    assert answers[0].json() == answers[1].json()
    backend.is_kept = False  # computed anew it is the same: its seed is made of its name
    again = second.post("/v1/chat/completions", json=whole, headers=headers)
    assert again.json() | {"created": 0} == answers[0].json() | {"created": 0}
    assert backend.parts[-1].at == ""


def test_a_stream_that_nobody_keeps_is_computed_again_up_to_where_the_client_is(two: Any) -> None:
    backend, first, second = two
    headers = {"idempotency-key": "lost", "x-baton-created": "1700000000"}
    told = events(first.post("/v1/chat/completions", json=CHAT, headers=headers).text)
    backend.is_kept = False
    for place in (0, 7, len(told) - 2):
        rest = second.post("/v1/chat/completions", json=CHAT, headers=headers | {"last-event-id": id_of(told[place])})
        assert rest.text == "".join(told[place + 1 :])


def test_another_body_under_the_same_key_is_refused(two: Any) -> None:
    _, first, second = two
    headers = {"idempotency-key": "same"}
    assert first.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    other = second.post("/v1/chat/completions", json=CHAT | {"max_tokens": 3}, headers=headers)
    assert other.status_code == 422 and error_of(other)["code"] == "idempotency_key_reused"


def test_one_key_does_not_stand_for_requests_to_two_endpoints(two: Any) -> None:
    _, first, second = two
    headers, body = {"idempotency-key": "both"}, {"messages": ASK, "max_tokens": 3}
    assert first.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
    other = second.post("/v1/messages", json=body, headers=headers)
    assert other.status_code == 422 and "same endpoint" in other.json()["error"]["message"]


def test_what_nobody_knows_the_question_of_is_computed_anew(two: Any) -> None:
    backend, first, second = two
    headers = {"idempotency-key": "lost ticket".replace(" ", "-")}
    first.post("/v1/chat/completions", json=CHAT, headers=headers)
    backend.tickets = dict.fromkeys(backend.tickets, b"")
    again = second.post("/v1/chat/completions", json=CHAT | {"max_tokens": 3}, headers=headers)
    assert again.status_code == 200 and backend.parts[-1].at == ""


@pytest.mark.parametrize("first", [b"\0", b"\1"])
def test_a_ticket_of_the_release_before_is_read(first: bytes) -> None:
    """While a cluster is renewed, workers have some."""
    head = {"kind": "chat", "owner": "o", "job": "j", "created": 5, "digest": "d", "earlier": None}
    text = json.dumps(head).encode() + b"\n{}"
    assert Ticket.read(first + (zlib.compress(text) if first == b"\1" else text)) == Ticket(
        "chat", "o", Naming("j", 5), "d", b"{}"
    )


@pytest.mark.parametrize("name", ["plain", "completion", "response", "message"])
def test_a_new_request_has_no_events_to_go_on_from(two: Any, name: str) -> None:
    backend, first, _ = two
    path, body, _ = STREAMS[name]
    refused = first.post(path, json=body, headers={"last-event-id": "3"})
    assert refused.status_code == 400 and "Idempotency-Key" in refused.json()["error"]["message"]
    assert not backend.requests


def test_a_request_that_waits_for_a_worker_is_queued(two: Any) -> None:
    backend, first, second = two
    first.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 4}, headers={"idempotency-key": "k"})
    backend.is_waiting = True
    state = second.get("/v1/requests/k").json()
    assert (state["status"], state["choices"]) == ("queued", [])


def test_the_best_of_several_choices_have_no_stream(two: Any) -> None:
    backend, first, second = two
    body = {"prompt": "Hi", "max_tokens": 4, "best_of": 3, "n": 1}
    answer = first.post("/v1/completions", json=body, headers={"idempotency-key": "k"}).json()
    refused = second.get("/v1/requests/k/stream")
    assert refused.status_code == 400 and "best_of" in error_of(refused)["message"]
    again = second.post("/v1/completions", json=body, headers={"idempotency-key": "k"}).json()
    assert again["choices"] == answer["choices"] and backend.parts[-1].at == "decode-0"


@pytest.mark.parametrize("path", ["/v1/requests/{}/stream", "/v1/responses/{}?stream=true"])
def test_what_a_follower_leaves_goes_on_for_a_while(two: Any, path: str) -> None:
    """It may be the only reader: the router that the request was sent to may be gone."""
    backend, first, second = two
    answer = first.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 5}).json()
    backend.pause = Hang()
    before = num_gone(second)
    with second.stream("GET", path.format(answer["id"])) as stream:
        next(stream.iter_lines())
    while num_gone(second) == before:
        pass
    assert not backend.cancelled and backend.parts[-1].lets_go
    backend.pause.release()


def num_gone(router: httpx.Client) -> float:
    """How many clients this router has seen leave."""
    lines = [line for line in router.get("/metrics").text.splitlines() if line.startswith("baton_requests_total{")]
    return sum(float(line.split()[-1]) for line in lines if 'refusal="client_disconnected"' in line)


def test_nobody_reads_what_another_key_has_asked_for(two: Any) -> None:
    backend, first, second = two
    body, headers = CHAT, {"idempotency-key": "mine"}
    first.post("/v1/chat/completions", json=body, headers=headers)
    job = next(iter(backend.tickets))
    foreign = {"authorization": "Bearer other"}
    for name in (job, f"chatcmpl-{job}", "mine"):
        assert second.get(f"/v1/requests/{name}").status_code == 200
        for path in (f"/v1/requests/{name}", f"/v1/requests/{name}/stream"):
            refused = second.get(path, headers=foreign)
            assert refused.status_code == 404 and error_of(refused)["code"] == "request_not_found"
    second.post("/v1/chat/completions", json=body, headers=headers | foreign)
    assert backend.parts[-1].at == "", "the same key of another client names another request"


def test_the_state_of_a_request_says_where_it_is(two: Any) -> None:
    _, first, second = two
    first.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 4, "n": 2}, headers={"idempotency-key": "k"})
    state = second.get("/v1/requests/k").json()
    assert state["status"] == "completed" and state["kind"] == "completion"
    assert state["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert [choice["worker"] for choice in state["choices"]] == ["decode-0"] * 2


@pytest.mark.parametrize("after", ["x", "3,4", "1e1", "5+", "-1"])
def test_what_is_no_event_s_id_is_refused(two: Any, after: str) -> None:
    backend, first, second = two
    first.post("/v1/chat/completions", json=CHAT)
    refused = second.get(f"/v1/requests/{next(iter(backend.tickets))}/stream", params={"after": after})
    assert refused.status_code == 400 and error_of(refused)["param"] == "after"


def test_a_body_that_is_too_long_to_be_kept_is_told_again_to_who_sends_it_again(two: Any, monkeypatch: Any) -> None:
    backend, first, second = two
    monkeypatch.setattr("router.api.tickets.MAX_TICKET_BYTES", 400)
    body = CHAT | {"metadata": {"letters": "".join(chr(33 + place * 7 % 90) for place in range(3000))}}
    headers = {"idempotency-key": "long"}
    told = events(first.post("/v1/chat/completions", json=body, headers=headers).text)
    refused = second.get("/v1/requests/long/stream")
    assert refused.status_code == 404 and error_of(refused)["code"] == "request_not_kept"
    rest = second.post("/v1/chat/completions", json=body, headers=headers | {"last-event-id": id_of(told[4])})
    assert rest.text == "".join(told[5:]) and backend.parts[-1].at == "decode-0"


def test_a_stream_of_very_many_choices_has_no_ids(two: Any) -> None:
    backend, first, second = two
    told = first.post("/v1/completions", json={"prompt": "Hi", "n": 65, "stream": True, "max_tokens": 2}).text
    assert "id: " not in told
    refused = second.get(f"/v1/requests/{next(iter(backend.tickets))}/stream", params={"after": "3"})
    assert refused.status_code == 400


async def test_others_have_their_turn_while_a_long_answer_is_told_again(thinking_folder: Path) -> None:
    tokenizer, turns = Tokenizer.load(thinking_folder), 0
    request = Request("r", (5, 6, 7), SamplingParams(max_tokens=2000, seed=1))

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(take_turns())
    retelling = Retelling(request, tokenizer, 4096, has_text=True)
    for position in range(1000):
        assert [piece async for piece in retelling.pieces(Output("r", position, (300,), "x"))]
    assert turns == 0, "what comes piece by piece costs nothing more"
    pieces = [piece async for piece in retelling.pieces(Output("r", 1000, (300,) * 1000))]
    other.cancel()
    assert len(pieces) == 1000 and turns >= 2 * 1000 // BITE - 2
