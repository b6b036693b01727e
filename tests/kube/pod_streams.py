"""Clients that stream completions from a Service one after the other, and compare each with the answer that a quiet cluster gave."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

TIMEOUT_S = 600.0
PAUSE_S = 1.0
"""Between two streams of a thread: pods must start beside them."""
Object = dict[str, Any]


class ApiClient:
    """Of one address; a connection for each request, so that each may come to another router."""

    def __init__(self, address: str, port: int, key: str, admin_key: str) -> None:
        self._address, self._port = address, port
        self._keys = {"api": key, "admin": admin_key}

    def ask(self, path: str, body: Object | None = None, kind: str = "api") -> Object:
        connection, answer = self._send(path, body, kind)
        with connection:
            text = answer.read()
            assert answer.status == 200, f"{answer.status}: {text[:500]!r}"
            found: Object = json.loads(text)
            return found

    def stream(self, body: Object) -> str:
        """The whole text of a stream that ended in order."""
        connection, answer = self._send("/v1/completions", {**body, "stream": True}, "api")
        with connection:
            assert answer.status == 200, f"{answer.status}: {answer.read()[:500]!r}"
            text, is_done = "", False
            for line in answer:
                if not line.startswith(b"data: "):  # an event's id, or a comment that keeps a quiet connection open
                    continue
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    is_done = True
                else:
                    event = json.loads(data)
                    assert "choices" in event, event
                    text += "".join(choice["text"] for choice in event["choices"])
            assert is_done, f"the stream broke off after {len(text)} characters"
            return text

    def _send(self, path: str, body: Object | None, kind: str) -> tuple[_Closing, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._address, self._port, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._keys[kind]}"}
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        return _Closing(connection), connection.getresponse()


class _Closing:
    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._connection.close()


class Streams:
    """Streams from `start` to `finish`, one in each thread of `threads`; none is asked for twice."""

    def __init__(self, client: ApiClient, bodies: Sequence[Object], threads: ThreadPoolExecutor, at_once: int) -> None:
        self._client, self._bodies, self._at_once = client, bodies, at_once
        self._threads = threads
        self.golden = [threads.submit(client.stream, body).result() for body in bodies]
        self._ending = threading.Event()
        self._running: list[Future[None]] = []
        self.num_done = 0
        self.faults: list[str] = []

    def start(self) -> None:
        self._running = [self._threads.submit(self._go_on, first) for first in range(self._at_once)]

    def finish(self) -> None:
        """Lets what runs end."""
        self._ending.set()
        for each in self._running:
            each.result(TIMEOUT_S)

    def _go_on(self, at: int) -> None:
        while not self._ending.is_set():
            which = at % len(self._bodies)
            at += 1
            try:
                text = self._client.stream(self._bodies[which])
            except (OSError, ValueError, AssertionError, http.client.HTTPException) as error:
                self.faults.append(f"stream {self.num_done}: {type(error).__name__}: {error}")
                self._ending.wait(0.5)
                continue
            if text != self.golden[which]:
                self.faults.append(f"stream {self.num_done} of {len(text)} characters differs")
            self.num_done += 1
            self._ending.wait(PAUSE_S)
