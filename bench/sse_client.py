"""A small HTTP/1.1 client for streamed completions, cheap enough not to be what a benchmark measures."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(slots=True)
class Measured:
    """One streamed request as the client saw it; times in seconds on this process's monotonic clock."""

    started_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    """When each chunk with text or tokens came."""
    token_counts: list[int] = field(default_factory=list)
    ended_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    error: str = ""


async def stream_completion(url: str, body: dict[str, Any], api_key: str = "", timeout_s: float = 600.0) -> Measured:
    """POSTs to {url}/v1/completions with stream on; errors are reported in the result, never raised."""
    measured = Measured(started_s=time.monotonic())
    try:
        await asyncio.wait_for(_exchange(url, body, api_key, measured), timeout_s)
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
        measured.error = measured.error or f"{type(error).__name__}: {error}"
    measured.ended_s = time.monotonic()
    return measured


async def _exchange(url: str, body: dict[str, Any], api_key: str, measured: Measured) -> None:
    parts = urlsplit(url)
    payload = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.hostname}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n"
    )
    if api_key:
        head += f"Authorization: Bearer {api_key}\r\n"
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=1 << 24)
    try:
        writer.write(head.encode() + b"\r\n" + payload)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            measured.error = f"HTTP {status}: {(await reader.read(2000)).decode(errors='replace')}"
            return
        is_done = False
        async for line in reader:
            # Chunk sizes of the transfer encoding are lines of their own and never begin with "data: ".
            if line.startswith(b"data: "):
                is_done = _on_event(line[6:].strip(), measured)
                if is_done:
                    break
        if not is_done:
            measured.error = measured.error or "the stream ended without [DONE]"
    finally:
        writer.close()


def _on_event(data: bytes, measured: Measured) -> bool:
    """Accounts for one event; True for [DONE]."""
    if data == b"[DONE]":
        return True
    event = json.loads(data)
    if "error" in event:
        measured.error = event["error"]["message"]
        return False
    measured.usage = event.get("usage") or measured.usage
    measured.trace = event.get("baton") or measured.trace
    for choice in event.get("choices", ()):
        num_tokens = len(choice.get("token_ids") or ())
        if num_tokens or choice.get("text"):
            measured.token_times_s.append(time.monotonic())
            measured.token_counts.append(num_tokens)
    return False
