"""Turns what Ray raises about an actor into one sentence: what happened to its process, why as far as anybody knows, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from workers.errors import BatonError, InvalidConfig
from workers.machine.limits import memory_kills

_MAX_TEXT = 300


class ActorFailed(BatonError):
    """The world's fault: the process behind an actor died or cannot be reached; the message says which one."""


@contextmanager
def told(name: str) -> Iterator[None]:
    """Lets no exception of Ray's through: InvalidConfig that the actor `name` raised stays one, all others become ActorFailed."""
    kills = memory_kills()
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, InvalidConfig):
            raise InvalidConfig(f"{name} cannot start: {cause}") from error
        raise ActorFailed(explain(name, error, memory_kills() - kills)) from error


def explain(name: str, error: RayError, num_kills: int) -> str:
    """What became of the actor `name`, of which a call failed with `error`. `num_kills`: of processes, by the kernel, meanwhile."""
    text = " ".join(str(error).split())
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        return f"{name} failed: {type(cause).__name__}: {' '.join(str(cause).split())[:_MAX_TEXT]}"
    if (
        isinstance(error, OutOfMemoryError)
        or "due to memory pressure" in text
        or "OOM" in text.partition("root causes")[0]
    ):
        return (
            f"Ray ended the process of {name} because its host's memory was nearly full, whoever filled it; give the host "
            "more memory, or start its Ray with RAY_memory_monitor_refresh_ms=0"
        )
    if isinstance(error, ActorUnavailableError):
        return f"the process of {name} died or does not answer; Ray starts it again{killed(num_kills)}"
    if isinstance(error, RayActorError):
        return f"the process of {name} died{killed(num_kills)} ({_reason(text)})"
    return f"Ray could not ask {name}: {text[:_MAX_TEXT]}"


def killed(num_kills: int) -> str:
    """A clause on what the kernel has ended meanwhile; empty when it was nothing."""
    if num_kills <= 0:
        return ""
    processes = "a process" if num_kills == 1 else f"{num_kills} processes"
    return f"; meanwhile the kernel has ended {processes} here for want of memory"


def _reason(text: str) -> str:
    """Ray's own finding, without the guesses that follow it and the folders of its logs."""
    _, _, detail = text.partition("Worker exit detail: ")
    return (detail or text).partition(" There are some potential root causes")[0][:_MAX_TEXT]
