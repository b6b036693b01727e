"""Frames JSON as server-sent events; it knows nothing of what the JSON says."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: Any) -> str:
    """Compact JSON on one line: also without the three characters that some clients take for line ends."""
    text = _encode(value)
    if text.isascii():
        return text
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
