"""Writes JSON, also such that is too long to be written in one go, and frames it as server-sent events; knows nothing of what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n"
"""A comment that ends no event: openai's client takes a blank line for the end of one, even of one without data, once it has seen an id."""
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_encode_text = json.encoder.encode_basestring
_encode = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=lambda lazy: lazy.whole()
).encode


def to_json(value: Any) -> str:
    """Compact JSON on one line: also without the three characters that some clients take for line ends. A Lazy value in it is made at once."""
    text = _encode(value)
    if text.isascii():
        return text
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def text_to_json(text: str) -> str:
    """As `to_json`, of a string."""
    written = _encode_text(text)
    return written if written.isascii() else to_json(text)


BITE = 64
"""Entries of a long list that are written at once: the encoder lets nothing else run meanwhile."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """A JSON value that is made as it is written, once: its text in `parts`, or what `whole` returns."""

    parts: Iterable[str]
    whole: Callable[[], Any]


def lazy_list(num_entries: int, entries: Callable[[range], Sequence[Any]], size: int = 1) -> Lazy:
    """An array of entries that `entries(places)` makes, a bite of them at a time: the fewer, the larger each is (`size`)."""
    bite = max(1, BITE // size)

    def parts() -> Iterator[str]:
        yield "["
        for start in range(0, num_entries, bite):
            text = to_json(entries(range(start, min(start + bite, num_entries))))[1:-1]
            yield f",{text}" if start else text
        yield "]"

    return Lazy(parts(), lambda: entries(range(num_entries)))


def lazy_each(values: Iterable[Any]) -> Lazy:
    """An array of values that are long themselves."""

    def parts() -> Iterator[str]:
        before = "["
        for value in values:
            yield before
            yield from json_parts(value)
            before = ","
        yield "]" if before == "," else "[]"

    return Lazy(parts(), lambda: list(values))


def json_parts(value: Any) -> Iterator[str]:
    """The text of `to_json` in parts, none of which takes long; the value may have Lazy ones in it.

    A list is long where it has more than BITE entries; what one entry holds is written at once, unless it is Lazy.
    """
    match value:
        case Lazy(parts):
            yield from parts
        case dict():
            before = "{"
            for name, inner in value.items():
                yield f"{before}{to_json(name)}:"
                yield from json_parts(inner)
                before = ","
            yield "}" if value else "{}"
        case list() | tuple() if len(value) > BITE:
            yield from lazy_list(len(value), lambda places: value[places.start : places.stop]).parts
        case _:
            yield to_json(value)


def named_event(value: dict[str, Any]) -> str:
    """An event that goes by the value's own type."""
    return f"event: {value['type']}\ndata: {to_json(value)}\n\n"


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
