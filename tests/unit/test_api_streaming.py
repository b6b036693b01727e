"""A stream says exactly what the whole answer says, piece by piece, and ends properly."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_backend import CHECKPOINT, MESSAGES, MODEL, Api, FakeBackend, Hang, Step, open_api, say, speak
from openai._streaming import SSEDecoder

from router.api import sse
from router.api.chat import ChatShape
from router.api.chunk_writer import ChunkWriter
from router.api.completions import CompletionShape
from router.api.job_progress import JobProgress
from router.api.metrics import Metrics
from router.api.schema import ChatBody, CompletionBody, parse_body
from router.api.shapes import Shape
from router.api.translate import translate_chat, translate_completion
from router.config import ApiConfig
from router.http_protocol import ChunkedWriter
from workers.request import FinishReason, Output, Request
from workers.text.tokenizer import Tokenizer

SAMPLED = {"model": MODEL.name, "seed": 7, "max_tokens": 40}


def stream_chat(api: Api, **fields: Any) -> list[Any]:
    return list(api.client.chat.completions.create(messages=MESSAGES, stream=True, **{**SAMPLED, **fields}))


def texts(chunks: list[Any], n: int) -> list[str]:
    said = [""] * n
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content if hasattr(choice, "delta") else choice.text
    return said


TEXTS = ("word", 'say "no"', "\\", "\n", "\0", "\x1f", "é你🙂", "a\u2028b\u2029c\x85", "</think>", "data: [DONE]\n\n")


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("of_chat", [True, False])
def test_a_chunk_of_text_alone_is_to_the_byte_what_its_shape_writes(of_chat: bool, include_usage: bool) -> None:
    tokenizer, config = Tokenizer.load(str(CHECKPOINT)), ApiConfig()
    asked: dict[str, Any] = {"stream": True, "n": 2, "stream_options": {"include_usage": include_usage}}
    asked |= {"messages": MESSAGES} if of_chat else {"prompt": "Hi"}
    raw = json.dumps(asked).encode()
    if of_chat:
        job = translate_chat(parse_body(ChatBody, raw), MODEL, tokenizer, config)
        shape: Shape = ChatShape(job, tokenizer)
    else:
        job = translate_completion(parse_body(CompletionBody, raw), MODEL, tokenizer, config)
        shape = CompletionShape(job, tokenizer)
    progress = JobProgress(job, Metrics(FakeBackend(tokenizer)), 0.0)
    writer = ChunkWriter(job, shape, progress)
    assert shape.shows_text_alone
    for choice in progress.choices:
        choice.is_announced = True
        for text in TEXTS:
            output = Output("r", 0, (5,), text)
            end = ',"usage":null}\n\n' if include_usage else "}\n\n"
            (chunk,) = writer.chunk(choice, output)
            assert chunk == f"data: {shape.head()}{shape.piece(choice, output)}]{end}"
        assert list(writer.chunk(choice, Output("r", 0, (5,)))) == []


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_chat_text_joins_to_the_whole_answer(api: Api, n: int) -> None:
    whole = api.client.chat.completions.create(messages=MESSAGES, n=n, **SAMPLED)
    assert texts(stream_chat(api, n=n), n) == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_completion_text_joins_to_the_whole_answer(api: Api, echo: bool) -> None:
    asked: dict[str, Any] = {**SAMPLED, "prompt": ["one", "two"], "n": 2, "echo": echo}
    whole = api.client.completions.create(**asked)
    assert texts(list(api.client.completions.create(**asked, stream=True)), 4) == [
        choice.text for choice in whole.choices
    ]


def test_the_first_chat_chunk_of_each_choice_names_the_assistant_and_no_other_does(api: Api) -> None:
    roles: dict[int, list[str | None]] = {0: [], 1: []}
    for chunk in stream_chat(api, n=2):
        for choice in chunk.choices:
            roles[choice.index].append(choice.delta.role)
    for said in roles.values():
        assert said[0] == "assistant" and set(said[1:]) == {None}


def test_each_choice_has_one_finish_reason_and_nothing_after_it(api: Api) -> None:
    for chunks in (
        stream_chat(api, n=3),
        list(api.client.completions.create(prompt="Hi", n=3, stream=True, **SAMPLED)),
    ):
        finished: list[int] = []
        for chunk in chunks:
            for choice in chunk.choices:
                assert choice.index not in finished
                finished += [choice.index] if choice.finish_reason else []
        assert sorted(finished) == [0, 1, 2]


def test_the_finishing_chunk_carries_text_too(api: Api) -> None:
    api.backend.script = lambda backend, request: say(backend, request, backend.tokenizer.encode(" the day"))
    last = stream_chat(api)[-1].choices[0]
    assert last.finish_reason == "length" and last.delta.content == " day"


def test_include_usage_adds_one_last_chunk_without_choices_and_others_have_null(api: Api) -> None:
    chunks = stream_chat(api, stream_options={"include_usage": True})
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(chunk.choices for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.completion_tokens == 40 and usage.total_tokens == usage.prompt_tokens + 40
    whole = api.client.chat.completions.create(messages=MESSAGES, **SAMPLED)
    assert whole.usage == usage


def test_usage_null_is_written_out_with_include_usage_and_absent_without(api: Api) -> None:
    body = {**SAMPLED, "messages": MESSAGES, "stream": True}
    asked = api.http.post("/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}}).text
    plain = api.http.post("/v1/chat/completions", json=body).text
    assert '"usage":null' in asked.split("\n\n")[0] and '"usage"' not in plain


def test_continuous_usage_grows_strictly_up_to_the_exact_count(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream_chat(api, n=2, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[:-1] == sorted(set(counts[:-1])) and counts[-1] == counts[-2] == 80
    assert all(
        chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens for chunk in chunks
    )


def test_continuous_usage_alone_is_no_usage(api: Api) -> None:
    body = {**SAMPLED, "messages": MESSAGES, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert '"usage"' not in api.http.post("/v1/chat/completions", json=body).text


def test_a_stream_ends_with_done_and_is_one_event_per_paragraph(api: Api) -> None:
    text = api.http.post("/v1/completions", json={**SAMPLED, "prompt": "Hi", "stream": True}).text
    *chunks, done, rest = text.split("\n\n")
    assert done == "id: 40e+1\ndata: [DONE]" and rest == ""
    counts = [int(chunk.partition("\n")[0].removeprefix("id: ")) for chunk in chunks[:-1]]
    assert counts == sorted(set(counts)) and chunks[-1].startswith("id: 40e\n")
    assert {json.loads(chunk.partition("data: ")[2])["object"] for chunk in chunks} == {"text_completion"}


def test_characters_that_some_clients_take_for_line_ends_are_escaped(api: Api) -> None:
    said = "a\u2028b\u2029c\x85d\r\ne"
    api.backend.script = lambda backend, request: say(backend, request, backend.tokenizer.encode(said))
    body = {**SAMPLED, "messages": MESSAGES, "stream": True}
    raw = api.http.post("/v1/chat/completions", json=body).text
    assert all(line == "" or line.startswith(("data: ", "id: ")) for line in raw.splitlines())
    assert texts(stream_chat(api), 1) == [said]


def test_chunks_share_one_id_and_the_served_models_name(api: Api) -> None:
    chunks = stream_chat(api, n=2)
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    assert {(chunk.model, chunk.object) for chunk in chunks} == {(MODEL.name, "chat.completion.chunk")}


def test_the_choices_of_a_stream_are_read_side_by_side(api: Api) -> None:
    """Choice 0 waits for ever until choice 1, which comes after it, has been sent whole."""
    hang = Hang()

    def script(backend: FakeBackend, request: Request) -> list[Step]:
        steps = speak(backend, request)
        return [steps[0], hang, *steps[1:]] if request.choice_index == 0 else steps

    api.backend.script = script
    finished = []
    for chunk in api.client.chat.completions.create(messages=MESSAGES, stream=True, n=2, **SAMPLED):
        for choice in chunk.choices:
            if choice.finish_reason:
                finished.append(choice.index)
                if choice.index == 1:
                    hang.release()
    assert finished == [1, 0]


def test_a_silent_stream_opens_and_sends_comments_that_clients_skip() -> None:
    hang = Hang()
    with open_api(ApiConfig(heartbeat_s=0.01)) as api:
        api.backend.script = lambda backend, request: [hang, *speak(backend, request)]
        body = {**SAMPLED, "messages": MESSAGES, "stream": True}
        with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert [next(lines), next(lines)] == [": heartbeat", ": heartbeat"]
            hang.release()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        hang = Hang()
        api.backend.script = lambda backend, request: [hang, *speak(backend, request)]
        chunks = api.client.chat.completions.create(messages=MESSAGES, stream=True, **SAMPLED)
        hang.release()
        assert texts(list(chunks), 1)[0]


def test_openais_client_takes_no_comment_in_the_middle_of_a_stream_for_an_event() -> None:
    hang, raw = Hang(), b""
    with open_api(ApiConfig(heartbeat_s=0.01)) as api:
        api.backend.script = lambda backend, request: [*speak(backend, request)[:2], hang, *speak(backend, request)[2:]]
        body = {**SAMPLED, "messages": MESSAGES, "stream": True}
        with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for part in response.iter_raw():
                raw += part
                if b"\nid: " in raw and raw.endswith(sse.HEARTBEAT):
                    hang.release()
    events = list(SSEDecoder().iter_bytes(iter([raw])))
    assert len(events) > 3 and all(event.data for event in events), raw


def test_a_stream_whose_tokens_have_no_text_sends_comments_too() -> None:
    is_enough = threading.Event()

    def wordless(backend: FakeBackend, request: Request) -> Iterator[Step]:
        """One output after another without a character, until the client has seen enough."""
        position = 0
        while not is_enough.is_set():
            yield Output(request.request_id, position, (2,))
            position += 1
        yield Output(request.request_id, position, (2,), finish_reason=FinishReason.STOP)

    with open_api(ApiConfig(heartbeat_s=0.01)) as api:
        api.backend.script = wordless  # type: ignore[assignment]
        body = {**SAMPLED, "messages": MESSAGES, "stream": True}
        with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line and not line.startswith("id: "))
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
            assert [next(lines), next(lines)] == [": heartbeat", ": heartbeat"]
            is_enough.set()
            assert list(lines)[-1] == "data: [DONE]"


def raw_stream(api: Api, version: str = "1.1") -> bytes:
    """The bytes of a streamed answer, put together from its chunks, which must be whole and end with the empty one."""
    body = json.dumps({**SAMPLED, "messages": MESSAGES, "stream": True, "max_tokens": 12}).encode()
    parts = urlsplit(api.url)
    head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: {parts.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        got = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    rest = got.partition(b"\r\n\r\n")[2]
    parts_of_body = [rest] if version == "1.0" else []
    while version != "1.0" and rest != b"0\r\n\r\n":
        size, _, rest = rest.partition(b"\r\n")
        parts_of_body.append(rest[: int(size, 16)])
        assert rest[int(size, 16) :][:2] == b"\r\n"
        rest = rest[int(size, 16) + 2 :]
    return re.sub(rb'"id":"chatcmpl-\w+"|"created":\d+', b"", b"".join(parts_of_body))


def test_what_is_written_where_it_comes_is_to_the_byte_what_the_layers_write(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of HTTP/1.0, which knows no chunks, is written to through the ASGI layers only."""
    written: list[bytes] = []
    write = ChunkedWriter.write

    def noted(self: ChunkedWriter, body: bytes) -> None:
        written.append(body)
        write(self, body)

    monkeypatch.setattr(ChunkedWriter, "write", noted)
    directly = raw_stream(api, "1.1")
    num_chunks = directly.count(b'"content"')
    assert num_chunks > 5 and len(written) == num_chunks - 2  # all but the first and the last
    written.clear()
    assert raw_stream(api, "1.0") == directly and not written
