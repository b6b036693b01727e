"""The client that hides routers' deaths: connections break at any byte, and each event still comes exactly once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from fake_backend import MODEL, serve
from keeping_backend import KeepingBackend

from router.config import ApiConfig
from router.resume import NotAnswered, RequestFailed, ResumingClient, resuming_http
from workers.errors import Refusal, Refused
from workers.text.tokenizer import Tokenizer

BODY = {"prompt": "Hi", "max_tokens": 40, "temperature": 0.8, "stream_options": {"include_usage": True}}


class Breaker:
    """Listens before a router; the first connections break after so many bytes of their answers, in this order."""

    def __init__(self, url: str, breaks: list[int]) -> None:
        self._there = (urlsplit(url).hostname, urlsplit(url).port)
        self._breaks = breaks
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._door.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            left = self._breaks.pop(0) if self._breaks else 1 << 30
            router = socket.create_connection(self._there)
            threading.Thread(target=self._carry, args=(client, router, 1 << 30), daemon=True).start()
            threading.Thread(target=self._carry, args=(router, client, left), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, left: int) -> None:
        try:
            while left > 0 and (data := source.recv(min(left, 1 << 16))):
                target.sendall(data)
                left -= len(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.fixture(scope="module")
def served(thinking_folder: Path) -> Iterator[tuple[KeepingBackend, str]]:
    backend = KeepingBackend(Tokenizer.load(thinking_folder))
    with serve(backend, ApiConfig()) as url:
        yield backend, url


@contextmanager
def breaking(url: str, *breaks: int) -> Iterator[str]:
    breaker = Breaker(url, list(breaks))
    try:
        yield breaker.url
    finally:
        breaker.close()


@pytest.mark.parametrize("is_kept", [True, False])
def test_every_event_comes_once_wherever_connections_break(served: tuple[KeepingBackend, str], is_kept: bool) -> None:
    backend, url = served
    backend.reset()
    with ResumingClient(url) as client:
        whole = list(client.stream("/v1/completions", BODY, key="golden"))
    assert client.num_resumed == 0
    backend.is_kept = is_kept
    with breaking(url, 10, 700, 1500, 2222, 333, 4000, 900) as broken, ResumingClient([broken], api_key="") as client:
        told = list(client.stream("/v1/completions", BODY, key="golden"))
    assert [event | {"created": 0} for event in told] == [event | {"created": 0} for event in whole]
    assert client.num_resumed == len(client.gaps_s) == 3, (
        "of seven breaks four come before a new event: they are begun anew"
    )


def test_a_stream_whose_events_have_no_ids_is_not_told_twice(served: tuple[KeepingBackend, str]) -> None:
    backend, url = served
    backend.reset()
    told = 0
    with breaking(url, 20_000) as broken, ResumingClient(broken) as client, pytest.raises(NotAnswered, match="no ids"):
        for _ in client.stream("/v1/completions", BODY | {"n": 65}):
            told += 1
    assert told and len(backend.requests) == 65
    with breaking(url, 10) as broken, ResumingClient(broken) as client:  # nothing of it had come
        assert len(list(client.stream("/v1/completions", BODY | {"n": 65, "max_tokens": 1}))) > 65


def test_what_a_router_says_of_trying_again_is_heeded(served: tuple[KeepingBackend, str]) -> None:
    backend, url = served
    backend.reset()
    waits: list[float] = []
    with ResumingClient(url, give_up_s=30.0) as client, pytest.raises(RequestFailed, match="504"):
        backend.refusals = {0: Refused(Refusal.DEADLINE_EXCEEDED, "too late")}
        client.create("/v1/completions", {"prompt": "Hi"})
    assert not backend.requests
    backend.refusals = {0: Refused(Refusal.RATE_LIMITED, "later", 7.0)}

    def pass_time(seconds: float) -> None:
        waits.append(seconds)
        backend.refusals.clear()

    with ResumingClient(url, give_up_s=30.0, sleep=pass_time) as client:
        assert client.create("/v1/completions", {"prompt": "Hi", "max_tokens": 2})["usage"]["completion_tokens"] == 2
    assert waits == [7.0]
    backend.refusals = {len(backend.requests): Refused(Refusal.RATE_LIMITED, "later", 70.0)}
    with ResumingClient(url, give_up_s=30.0) as client, pytest.raises(NotAnswered, match="later"):
        client.create("/v1/completions", {"prompt": "Hi"})


def test_a_whole_answer_is_asked_for_again(served: tuple[KeepingBackend, str]) -> None:
    backend, url = served
    backend.reset()
    body = {name: value for name, value in BODY.items() if name != "stream_options"}
    with breaking(url, 0, 100, 400) as broken, ResumingClient(broken) as client:
        answer = client.create("/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 40
    assert [part.at for part in backend.parts].count("") == 1, "it was computed once"


def test_below_the_openai_client_nothing_shows(served: tuple[KeepingBackend, str]) -> None:
    backend, url = served
    backend.reset()
    with breaking(url, 900, 1700, 500) as broken:
        client = openai.OpenAI(
            base_url="http://baton/v1", api_key="k", http_client=resuming_http([broken, url], "k"), max_retries=0
        )
        ask = {"model": MODEL.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40}
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
        assert chunks[-1].usage.completion_tokens == 40 and chunks[-2].choices[0].finish_reason == "length"
        assert client.chat.completions.create(**ask).usage.completion_tokens == 40  # type: ignore[call-overload]
        assert client.models.list().data[0].id == backend.model.name  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ask | {"max_tokens": -1})
        client.close()


def test_what_is_wrong_is_not_asked_for_again_and_who_does_not_answer_not_for_ever(
    served: tuple[KeepingBackend, str],
) -> None:
    backend, url = served
    backend.reset()
    with ResumingClient(url) as client, pytest.raises(RequestFailed, match="400") as failed:
        list(client.stream("/v1/completions", BODY | {"max_tokens": -1}))
    assert failed.value.error["param"] == "max_tokens"
    with ResumingClient(url) as client, pytest.raises(RequestFailed, match="409"):
        backend.refusals = {0: Refused(Refusal.CANCELLED, "stopped")}
        client.create("/v1/completions", {"prompt": "Hi"})
    with socket.create_server(("127.0.0.1", 0)) as door:
        gone = f"http://127.0.0.1:{door.getsockname()[1]}"
    with ResumingClient(gone, give_up_s=0.2) as client, pytest.raises(NotAnswered):
        client.create("/v1/completions", {"prompt": "Hi"})
