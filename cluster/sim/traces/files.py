"""Reads traces by their ending: Mooncake's JSON lines, which a router's access log has too, and Azure's CSV. A line that cannot be read is named. Knows no simulation."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.sim.load import TraceRequest
from cluster.sim.product import InvalidConfig

MOONCAKE_TOKENS = 512
"""Prompt tokens behind one hash id."""
MAX_TOKENS = 1 << 24
MAX_REQUESTS = 10_000_000
_OWN_TEXT = 1 << 28
"""Texts from this number on belong to one request each, in traces that say nothing of prefixes."""


def read_trace(path: Path) -> list[TraceRequest]:
    """In order of arrival, the first at 0 s. Raises InvalidConfig with file and line."""
    readers = {".jsonl": _read_mooncake, ".csv": _read_azure}
    reader = readers.get(path.suffix)
    if reader is None:
        raise InvalidConfig(f"{path}: a trace ends in .jsonl (Mooncake) or .csv (Azure)")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            requests = list(reader(path, file))
    except OSError as error:
        raise InvalidConfig(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"the trace {path} is no text in UTF-8") from error
    if not requests:
        raise InvalidConfig(f"the trace {path} has no requests")
    requests.sort(key=lambda request: request.at_s)
    begin_s = requests[0].at_s
    return [replace(request, at_s=request.at_s - begin_s) for request in requests]


def _read_mooncake(path: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise InvalidConfig(f"{where}: this line is no JSON") from None
        if not isinstance(row, dict):
            raise InvalidConfig(f"{where}: this line is no JSON object")
        if "status" in row and not row.get("output_length"):
            continue  # of a router's access log, about something else than an answer
        num_prompt = _count(row.get("input_length"), f"{where}: input_length")
        texts = row.get("hash_ids")
        if not isinstance(texts, list) or not all(type(text) is int and 0 <= text < _OWN_TEXT for text in texts):
            raise InvalidConfig(f"{where}: hash_ids must be a list of numbers from 0 to {_OWN_TEXT - 1}")
        if len(texts) != -(-num_prompt // MOONCAKE_TOKENS):
            raise InvalidConfig(f"{where}: {len(texts)} hash_ids do not make a prompt of {num_prompt} tokens")
        num_output = _count(row.get("output_length"), f"{where}: output_length")
        at_s = _time(row.get("timestamp"), f"{where}: timestamp")
        yield TraceRequest(at_s / 1000, tuple(texts), MOONCAKE_TOKENS, num_prompt, num_output)


def _read_azure(path: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    rows = csv.DictReader(lines)
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if rows.fieldnames is None or not set(wanted) <= set(rows.fieldnames):
        raise InvalidConfig(f"{path}:1: the columns must be {', '.join(wanted)}")
    for row in rows:
        where = f"{path}:{rows.line_num}"
        try:  # the files have seven digits of fraction, datetime reads six
            at = datetime.fromisoformat(str(row["TIMESTAMP"])[:26])
        except ValueError:
            raise InvalidConfig(f"{where}: TIMESTAMP {row['TIMESTAMP']!r} is no time") from None
        num_prompt = _count(_number(row["ContextTokens"]), f"{where}: ContextTokens")
        num_output = _count(_number(row["GeneratedTokens"]), f"{where}: GeneratedTokens")
        yield TraceRequest(at.timestamp(), own_text(rows.line_num), num_prompt, num_prompt, num_output)


def own_text(number: int) -> tuple[int, ...]:
    """A piece of text that no other request has."""
    return (_OWN_TEXT + number,)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise InvalidConfig(f"{what} must be a number of tokens from 1 to {MAX_TOKENS}; it is {value!r}")
    return value


def _time(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e15:
        raise InvalidConfig(f"{what} must be a time of at least 0; it is {value!r}")
    return float(value)


def scaled(requests: Iterable[TraceRequest], copies: int, speed: float) -> Iterator[TraceRequest]:
    """Each request `copies` times, by users who share nothing with each other, and `speed` times as fast as in the trace."""
    for request in requests:
        for copy in range(copies):
            texts = request.texts if not copy else tuple([text + copy * 2 * _OWN_TEXT for text in request.texts])
            yield replace(request, at_s=request.at_s / speed, texts=texts)
