"""A client that hides the death of routers: it sends a request again under the same Idempotency-Key, and goes on behind the last event it has.

Knows HTTP alone, and works with any number of routers' addresses or with one address of several. docs/api.md says the same in three
lines of HTTP for other languages.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx

CONNECT_S = 2.0
SILENCE_S = 60.0
"""A stream says something at least every `router.api.heartbeat_s`."""
AGAIN_S = 0.1
MOST_AGAIN_S = 2.0
_STATUSES = frozenset((429, 502, 503, 504))
"""Of a router that is about to end, that has no workers yet, or of a balancer in front of one that is gone."""
_CODES = frozenset(("shutting_down", "no_workers", "worker_lost", "not_kept", "taken_up", "queue_full"))
"""Of errors in mid-stream after which the same request may go on elsewhere."""


class NotAnswered(Exception):
    """No router gave the whole answer in time; the cause is the last failure."""


class RequestFailed(Exception):
    """The request itself was refused or has failed: asking again would not help."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {error.get('message', '')}")
        self.status = status
        self.error = error


class ResumingClient:
    """Used by one thread at a time. Every request has a key of its own, unless one is given."""

    def __init__(
        self,
        base_urls: str | Sequence[str],
        api_key: str = "",
        give_up_s: float = 60.0,
        http: httpx.Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`base_urls`: of routers, or of one balancer, without /v1; the first that answers is kept to. `give_up_s`: how long an
        answer may make no progress at all. With `http` its pool and settings are used, and it is not closed here. `sleep` waits for
        so many seconds."""
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        if not urls:
            raise ValueError("a ResumingClient needs the address of a router")
        self._urls = itertools.cycle([url.rstrip("/").removesuffix("/v1") for url in urls])
        self.url = next(self._urls)
        """Of the router that is asked next."""
        self._give_up_s = give_up_s
        self._sleep = sleep
        self._is_own = http is None
        self._http = http or httpx.Client(timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S), trust_env=False)
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.num_resumed = 0
        """How often an answer that had begun went on after its router was gone."""
        self.gaps_s: list[float] = []
        """For each of these, the time from the failure to the next event."""

    def __enter__(self) -> ResumingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._is_own:
            self._http.close()

    def create(self, path: str, body: Mapping[str, Any], key: str = "") -> dict[str, Any]:
        """The whole answer of a POST to `path`, such as /v1/chat/completions. Raises RequestFailed, NotAnswered."""
        answer = self.send(path, json.dumps(body).encode(), self.named(key))
        found: dict[str, Any] = answer.json()
        return found

    def stream(self, path: str, body: Mapping[str, Any], key: str = "") -> Iterator[dict[str, Any]]:
        """The events of the same as a stream, parsed, each once. Raises as `create`."""
        for event in self.events(path, json.dumps({**body, "stream": True}).encode(), self.named(key)):
            data = _data(event)
            if data and data != "[DONE]":
                yield json.loads(data)

    def send(self, path: str, content: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """`headers` with an Idempotency-Key; the same content must be sent each time."""
        patience = _Patience(self._give_up_s, self._sleep)
        while True:
            try:
                answer = self._http.post(f"{self.url}{path}", content=content, headers=self._all(headers))
            except httpx.TransportError as error:
                self._turn_to_another(patience, error)
                continue
            if answer.status_code < 400:
                return answer
            self._check(answer, answer.content, patience)

    def events(self, path: str, content: bytes, headers: Mapping[str, str]) -> Iterator[str]:
        """The raw events of a stream, each with the empty line that ends it, exactly once, up to the last one."""
        patience, last_id, failed_s, can_go_on = _Patience(self._give_up_s, self._sleep), "", 0.0, True
        while True:
            again = {"last-event-id": last_id} if last_id else {}
            try:
                with self._http.stream(
                    "POST", f"{self.url}{path}", content=content, headers=self._all({**headers, **again})
                ) as answer:
                    if answer.status_code >= 400:
                        self._check(answer, answer.read(), patience)
                        continue
                    for event in _split(answer.iter_text()):
                        if (error := _error_in(event)) is not None:
                            if error.get("code") not in _CODES:
                                raise RequestFailed(answer.status_code, error)
                            raise _Broken(str(error.get("message")))
                        if failed_s and last_id:  # the others are begun anew
                            self.num_resumed += 1
                            self.gaps_s.append(time.monotonic() - failed_s)
                        failed_s = 0.0
                        patience.progress()
                        yield event
                        event_id = _field(event, "id")
                        last_id, can_go_on = event_id or last_id, can_go_on and bool(event_id)
                        if _is_last(event):
                            return
                    raise _Broken("the stream ended before its last event")
            except (httpx.TransportError, _Broken) as error:
                if not can_go_on:
                    raise NotAnswered(f"the stream broke, and its events have no ids to go on from: {error}") from error
                failed_s = failed_s or time.monotonic()
                self._turn_to_another(patience, error)

    def ask(self, method: str, path: str, headers: Mapping[str, str]) -> httpx.Response:
        """Anything else than to be answered: of the first router that is there."""
        patience = _Patience(self._give_up_s, self._sleep)
        while True:
            try:
                answer = self._http.request(method, f"{self.url}{path}", headers=self._all(headers))
                return httpx.Response(answer.status_code, headers=_without_length(answer), content=answer.content)
            except httpx.TransportError as error:
                self._turn_to_another(patience, error)

    def named(self, key: str) -> dict[str, str]:
        """The headers by which a request is known when it is sent again."""
        return {"idempotency-key": key or uuid.uuid4().hex, "x-baton-created": str(int(time.time()))}

    def _all(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {"content-type": "application/json", **self._headers, **headers}

    def _check(self, answer: httpx.Response, content: bytes, patience: _Patience) -> None:
        """Waits before the next try, or raises."""
        status = answer.status_code
        try:
            error = json.loads(content)["error"]
        except (ValueError, KeyError, TypeError):
            error = {"message": content.decode(errors="replace")}
        failure = RequestFailed(status, error)
        if status not in _STATUSES or answer.headers.get("x-should-retry") == "false":
            raise failure
        self._turn_to_another(patience, failure, _seconds(answer.headers.get("retry-after", "")), status == 429)

    def _turn_to_another(
        self, patience: _Patience, cause: Exception, after_s: float = 0.0, is_limit: bool = False
    ) -> None:
        self.url = next(self._urls)
        patience.wait(cause, after_s, is_limit)


def _seconds(text: str) -> float:
    """Of a retry-after; one that is a date says nothing here."""
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0.0


class _Broken(Exception):
    pass


class _Patience:
    """The first try follows at once, later ones after a while that grows, and not before the last answer has said."""

    def __init__(self, give_up_s: float, sleep: Callable[[float], None]) -> None:
        self._give_up_s = give_up_s
        self._sleep = sleep
        self.progress()

    def progress(self) -> None:
        self._since_s: float | None = None
        self._num_tries = 0

    def wait(self, cause: Exception, after_s: float, is_limit: bool) -> None:
        """`is_limit`: other routers would say no as well."""
        now = time.monotonic()
        self._since_s = now if self._since_s is None else self._since_s
        wait_s = 0.0
        if self._num_tries or is_limit:
            wait_s = max(after_s, min(AGAIN_S * 2 ** max(0, self._num_tries - 1), MOST_AGAIN_S))
        if now + wait_s - self._since_s > self._give_up_s:
            raise NotAnswered(f"no router will have answered for {self._give_up_s:g} s: {cause}") from cause
        if wait_s:
            self._sleep(wait_s)
        self._num_tries += 1


def _split(texts: Iterator[str]) -> Iterator[str]:
    """Events, without comments; one that was cut off is none."""
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n\n")
        for event in whole:
            lines = [line for line in event.split("\n") if not line.startswith(":")]
            if any(lines):
                yield "\n".join([*lines, "", ""])


def _field(event: str, name: str) -> str:
    for line in event.split("\n"):
        field, _, value = line.partition(": ")
        if field == name:
            return value
    return ""


def _data(event: str) -> str:
    return _field(event, "data")


def _error_in(event: str) -> Mapping[str, Any] | None:
    """Of an event that ends a stream which cannot go on; it has no id."""
    data = _data(event)
    if _field(event, "id") or not data.startswith("{"):
        return None
    found = json.loads(data)
    error = found.get("error") or (found.get("response") or {}).get("error")
    return error if isinstance(error, dict) else None


_LAST = ("response.completed", "response.incomplete", "response.failed", "message_stop")


def _is_last(event: str) -> bool:
    return _data(event) == "[DONE]" or _field(event, "event") in _LAST


class _Transport(httpx.BaseTransport):
    """Below a client that knows nothing of routers, such as openai's. Anything but a POST of JSON goes to one router, once."""

    def __init__(self, client: ResumingClient) -> None:
        self._client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        client, path = self._client, request.url.raw_path.decode()
        kept = {name: value for name, value in request.headers.items() if name not in _HOP}
        if request.method != "POST":
            return client.ask(request.method, path, kept)
        content = request.read()
        headers = {**kept, **client.named(request.headers.get("idempotency-key", ""))}
        try:
            if json.loads(content or b"{}").get("stream"):
                events = client.events(path, content, headers)
                first = next(events, "")
                body = _Body(itertools.chain((first,), events))
                return httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, stream=body)
            answer = client.send(path, content, headers)
            return httpx.Response(answer.status_code, headers=_without_length(answer), content=answer.content)
        except RequestFailed as failure:
            return httpx.Response(failure.status, json={"error": dict(failure.error)})
        except NotAnswered as failure:
            raise httpx.ConnectError(str(failure)) from failure

    def close(self) -> None:
        self._client.close()


_HOP = frozenset(("host", "content-length", "connection", "transfer-encoding", "accept-encoding"))


def _without_length(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in {*_HOP, "content-encoding"}}


class _Body(httpx.SyncByteStream):
    def __init__(self, events: Iterator[str]) -> None:
        self._events = events

    def __iter__(self) -> Iterator[bytes]:
        try:
            for event in self._events:
                yield event.encode()
        except RequestFailed as failure:
            yield f"data: {json.dumps({'error': dict(failure.error)})}\n\n".encode()
        except NotAnswered as failure:
            raise httpx.ReadError(str(failure)) from failure


def resuming_http(base_urls: str | Sequence[str], api_key: str = "", give_up_s: float = 60.0) -> httpx.Client:
    """For `openai.OpenAI(http_client=...)`: what that client sends is answered as by a ResumingClient. Its own base_url may name any host."""
    client = ResumingClient(base_urls, api_key, give_up_s)
    return httpx.Client(transport=_Transport(client), timeout=None)
