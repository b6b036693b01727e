"""What one request used, as a line of the usage log says it: no text of it. And what lines of some time add up to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """One HTTP request that was run. Times in seconds; `ended_s` since 1970. None: there was none."""

    ended_s: float
    request_id: str
    tenant: str
    key_id: str
    endpoint: str
    model: str
    outcome: str
    """ok, or why it ended early: a refusal, or client_disconnected."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float | None
    total_s: float
    prefill_workers: tuple[str, ...] = ()
    decode_workers: tuple[str, ...] = ()

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))


def usage_of(line: str) -> Usage | None:
    """What `Usage.line` has written; None for anything else, such as a line that a full disk has cut."""
    try:
        written: dict[str, Any] = json.loads(line)
        usage = Usage(**{field.name: written[field.name] for field in fields(Usage)})
        usage.ended_s + usage.prompt_tokens + usage.cached_tokens + usage.completion_tokens  # are numbers
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return usage


@dataclass(slots=True)
class UsageTotal:
    """Of one group of requests."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, usage: Usage) -> None:
        self.requests += 1
        self.failed += usage.outcome != "ok"
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens


def totals(found: Iterable[Usage], by: str) -> dict[str, UsageTotal]:
    """By the value of a field, such as `tenant`."""
    groups: dict[str, UsageTotal] = {}
    for usage in found:
        groups.setdefault(str(getattr(usage, by)), UsageTotal()).add(usage)
    return dict(sorted(groups.items()))
