"""Which request an asyncio task works for, so that what it and the tasks below it log names that request; knows no formats."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

_about: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039 (nobody changes it)


def log_about(fields: Mapping[str, str]) -> Mapping[str, str]:
    """From now on messages of this task, and of tasks and timers that it starts, are about this (workers.request.Request.log_fields; empty: about nothing).
    Returns what they were about."""
    before = _about.get()
    _about.set(fields)
    return before


def logged_about() -> Mapping[str, str]:
    """What the running task has said of itself."""
    return _about.get()
