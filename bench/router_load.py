"""A load generator for routers: streams of one process, cheap enough to load a router that has a core of its own. Knows no router."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

WORD = b'"content":"'
END = b"0\r\n\r\n"


def chat_body(prompt: str, num_tokens: int, stream: bool = True) -> bytes:
    message = {"role": "user", "content": prompt}
    body = {"model": "model", "messages": [message], "max_tokens": num_tokens, "stream": stream}
    return json.dumps(body | ({"ignore_eos": True} if stream else {})).encode()


@dataclass(slots=True)
class Seen:
    """What all streams of a load saw together."""

    num_tokens: int = 0
    num_answers: int = 0
    num_started: int = 0
    """Streams whose first token has come."""
    ttfts_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One connection that sends a request, again as soon as it is answered, until it is told to stop."""

    def __init__(self, seen: Seen, request: bytes, is_repeated: bool, first_delay_s: float = 0.0) -> None:
        self._seen = seen
        self._request = request
        self._is_repeated = is_repeated
        self._first_delay_s = first_delay_s
        self._tail = b""
        self._has_first = False
        self._is_whole = b'"stream": true' not in request
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self._first_delay_s:
            asyncio.get_running_loop().call_later(self._first_delay_s, self._send)
        else:
            self._send()

    def _send(self) -> None:
        self._has_first, self._tail = False, b""
        self._sent_s = time.perf_counter()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        seen = self._seen
        seen.num_tokens += data.count(WORD)
        if not self._has_first:
            if WORD not in data:
                if not data.startswith(b"HTTP/1.1 200") and not self._tail:
                    self._stop(data[:300].decode(errors="replace"))
                    return
            else:
                self._has_first = True
                seen.num_started += 1
                seen.ttfts_s.append(time.perf_counter() - self._sent_s)
        self._tail = data[-8:]
        is_over = self._has_first if self._is_whole else data.endswith(END) or (self._tail + data).endswith(END)
        if is_over:
            seen.num_answers += 1
            if self._is_repeated and not self.ended.done():
                self._send()
            elif not self.ended.done():
                self.ended.set_result(None)

    def _stop(self, error: str) -> None:
        self._seen.errors.append(error)
        self._is_repeated = False
        if not self.ended.done():
            self.ended.set_result(None)
        self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self._stop(f"the connection was closed ({error})")


class Load:
    """Several streams to one URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self.seen = Seen()
        self.streams: list[Stream] = []

    async def open(self, num_streams: int, body: bytes, is_repeated: bool = False, spread_s: float = 0.0) -> None:
        """Opens streams; those that are repeated begin spread over a time, so that they do not go in step."""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}:{self._port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode()
        loop = asyncio.get_running_loop()
        for number in range(num_streams):
            delay_s = spread_s * number / num_streams
            _, stream = await loop.create_connection(
                lambda d=delay_s: Stream(self.seen, head + body, is_repeated, d),  # type: ignore[misc]
                self._host,
                self._port,
            )
            self.streams.append(stream)

    async def started(self, num_streams: int, timeout_s: float = 60.0) -> None:
        """Until so many have their first token."""
        async with asyncio.timeout(timeout_s):
            while self.seen.num_started < num_streams:
                if self.seen.errors:
                    raise AssertionError(f"a stream failed: {self.seen.errors[0]}")
                await asyncio.sleep(0.01)

    def close(self) -> None:
        for stream in self.streams:
            if not stream.ended.done():
                stream.ended.set_result(None)
            stream.transport.close()
