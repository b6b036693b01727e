"""A client that sends too much, too slowly or never reads is closed; whoever else is served does not notice."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import repeat
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_backend import Api, FakeBackend, Hang, Step, open_api, speak

from router.config import ApiConfig, HttpConfig
from workers.request import Output, Request

PATIENT = HttpConfig(max_header_bytes=8192, max_headers=32)
"""Of time it has more than these tests take."""
HASTY = HttpConfig(header_timeout_s=0.2, body_timeout_s=0.4, write_timeout_s=0.2)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


def connect(api: Api) -> socket.socket:
    return socket.create_connection((urlsplit(api.url).hostname, urlsplit(api.url).port), timeout=30)


def read_to_the_end(connection: socket.socket) -> bytes:
    received = b""
    try:
        while part := connection.recv(1 << 16):
            received += part
    except ConnectionResetError:
        pass  # it was closed before all that we sent was read
    return received


def send_until_closed(connection: socket.socket, parts: Iterator[bytes]) -> int:
    """How many bytes the server took before it closed."""
    sent = 0
    try:
        for part in parts:
            connection.sendall(part)
            sent += len(part)
    except (ConnectionResetError, BrokenPipeError):
        return sent
    raise AssertionError("the server took all of it")


def refused(api: Api, reason: str) -> bool:
    """Once that is counted."""
    line = f'baton_http_connections_refused_total{{reason="{reason}"}}'
    return any(line in api.http.get("/metrics").text for _ in range(1000))


def answer_of(received: bytes) -> tuple[int, Any]:
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda at: b"x" * (1 << 16), id="one header that never ends"),
        pytest.param(lambda at: b"x-%d: y\r\n" % at * 1000, id="headers without end"),
    ],
)
def test_a_head_without_end_is_refused_before_it_costs_anything(part: Callable[[int], bytes]) -> None:
    with open_api(http=PATIENT) as api:
        with closing(connect(api)) as connection:
            connection.sendall(HEAD + b"x-long: ")
            sent = send_until_closed(connection, (part(at) for at in range(10_000)))
            assert sent < 8 << 20, "what the kernel's buffers hold"
        assert refused(api, "headers_too_large")
        assert not api.backend.requests


@pytest.mark.parametrize("head", [b"x-long: " + b"y" * 8192, b"\r\n".join(b"x-%d: y" % at for at in range(40))])
def test_a_head_that_is_too_large_at_once_is_431(head: bytes) -> None:
    with open_api(http=PATIENT) as api, closing(connect(api)) as connection:
        connection.sendall(HEAD + head + b"\r\n\r\n")
        status, body = answer_of(read_to_the_end(connection))
        assert status == 431 and body["error"]["code"] == "headers_too_large"


def test_trailers_and_chunk_extensions_without_end_are_refused_too() -> None:
    with open_api(http=PATIENT) as api:
        for opening, part in ((b"2\r\n{}\r\n0\r\nx-long: ", b"y" * 4096), (b"2;", b"y" * 4096)):
            with closing(connect(api)) as connection:
                connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + opening)
                send_until_closed(connection, (part for _ in range(10_000)))


def test_a_trailer_is_no_header() -> None:
    with open_api(http=PATIENT) as api, closing(connect(api)) as connection:
        body = b'{"prompt":"a","max_tokens":1}'
        chunks = b"%x\r\n%s\r\n0\r\nx-request-id: of-a-trailer\r\n\r\n" % (len(body), body)
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunks)
        received = read_to_the_end(connection)
        assert received.startswith(b"HTTP/1.1 200") and b"of-a-trailer" not in received


def test_what_is_no_http_is_400_in_the_shape_of_all_errors() -> None:
    with open_api(http=PATIENT) as api:
        for garbage in (
            b"\x16\x03\x01\x02\x00\x01",
            b"GET\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            HEAD + b"a b: c\r\n\r\n",
        ):
            with closing(connect(api)) as connection:
                connection.sendall(garbage)
                status, body = answer_of(read_to_the_end(connection))
                assert status == 400 and body["error"]["code"] == "invalid_http"


def test_requests_sent_far_ahead_of_their_answers_end_the_connection() -> None:
    with open_api(http=PATIENT) as api, closing(connect(api)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 16)
        received = b""
        while received.count(b"HTTP/1.1 200") < 16:
            received += connection.recv(1 << 16)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 40)
        assert read_to_the_end(connection).count(b"HTTP/1.1 200") <= 18


@pytest.mark.parametrize(
    "sent",
    [b"", HEAD, HEAD + b"content-length: 9\r\n\r\n{", HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n"],
)
def test_a_silent_client_is_told_408_and_closed(sent: bytes) -> None:
    with open_api(http=HASTY) as api, closing(connect(api)) as connection:
        connection.sendall(sent)
        status, body = answer_of(read_to_the_end(connection))
        assert status == 408 and body["error"]["code"] == "request_timeout"
        assert not api.backend.requests


def test_a_body_that_goes_on_after_its_answer_is_cut_too() -> None:
    with open_api(ApiConfig(api_keys=("secret",)), http=HASTY) as api, closing(connect(api)) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")

        send_until_closed(connection, repeat(b"1\r\nx\r\n"))


def test_a_slow_stream_is_not_a_slow_client() -> None:
    """Neither the head's time nor the body's runs while an answer is under way, nor while nothing waits to be read."""
    hang = Hang()

    def script(backend: FakeBackend, request: Request) -> list[Step]:
        steps = speak(backend, request)
        return [*steps[:2], hang, *steps[2:]]

    with open_api(http=HASTY) as api:
        api.backend.script = script
        with closing(connect(api)) as connection, closing(connect(api)) as late:
            body = b'{"prompt":"a","max_tokens":4,"stream":true}'
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body + b"GET /hea")
            received = connection.recv(1 << 16)
            assert answer_of(read_to_the_end(late))[0] == 408  # opened later, and its time is over
            hang.release()
            while b"[DONE]" not in received:
                received += connection.recv(1 << 16)


def endless(backend: FakeBackend, request: Request) -> Any:
    return (Output(request.request_id, position, (300,), "x" * 10_000) for position in range(100_000))


@pytest.mark.parametrize("reads_some", [False, True])
def test_a_client_that_does_not_read_is_cut_and_what_it_asked_for_ends(reads_some: bool) -> None:
    with open_api(http=HASTY) as api:
        api.backend.script = endless
        body = b'{"prompt":"a","stream":true}'
        with closing(connect(api)) as connection:
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            if reads_some:
                connection.recv(100)
            assert api.backend.wait_until(lambda backend: len(backend.cancelled) == 1)
        assert refused(api, "not_read")


def test_one_connection_too_many_is_told_so() -> None:
    with (
        open_api(http=HttpConfig(max_connections=2)) as api,
        closing(connect(api)) as one,
        closing(connect(api)) as two,
        closing(connect(api)) as three,
    ):
        status, body = answer_of(read_to_the_end(three))
        assert status == 503 and body["error"]["code"] == "too_many_connections"
        for connection in (one, two):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            assert read_to_the_end(connection).startswith(b"HTTP/1.1 200")


def test_large_bodies_that_are_slow_to_come_are_bounded_and_keep_nobody_else_out() -> None:
    with open_api(ApiConfig(max_open_body_bytes=1 << 20)) as api, closing(connect(api)) as slow:
        large = {"prompt": "a", "max_tokens": 1, "user": "x" * 500_000}

        def status_of(body: dict[str, Any]) -> int:
            return api.http.post("/v1/completions", json=body).status_code

        slow.sendall(HEAD + b"content-length: 1048576\r\n\r\n")
        for _ in range(10):
            slow.sendall(b" " * 100_000)
            assert status_of({"prompt": "a", "max_tokens": 1}) == 200, (
                "each also gives the slow one's bytes time to be read"
            )
        assert any(status_of(large) == 429 for _ in range(1000))
        assert status_of({"prompt": "a", "max_tokens": 1}) == 200
        slow.close()
        assert any(status_of(large) == 200 for _ in range(1000)), "what was held is free again"


def test_where_memory_is_short_small_requests_are_served_and_large_ones_wait(caplog: pytest.LogCaptureFixture) -> None:
    with open_api(ApiConfig(min_free_bytes=1 << 60)) as api:
        large = api.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "user": "x" * 100_000})
        assert large.status_code == 429 and large.headers["retry-after"] == "1"
        assert api.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert caplog.text.count("memory is short") == 1 and "large requests are refused" in caplog.text


def test_a_request_in_small_pieces_is_served() -> None:
    with open_api(http=PATIENT) as api, closing(connect(api)) as connection:
        body = b'{"prompt":"a","max_tokens":1}'
        for byte in HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body:
            connection.sendall(bytes((byte,)))
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 200")


def test_ordinary_clients_notice_nothing() -> None:
    with open_api() as api:
        for _ in range(3):
            answer = api.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
            assert answer.status_code == 200 and answer.headers.get("connection") != "close"
        headers = {f"x-{at}": "y" * 100 for at in range(60)}
        assert httpx.get(f"{api.url}/health", headers=headers).status_code == 200
