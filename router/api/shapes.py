"""How the endpoints write their answers: what each of them has to say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from router.api.job_progress import Choice, JobProgress
from router.api.problems import Problem
from router.api.translate import Job
from workers.request import Output


class StreamWriter(Protocol):
    """Writes the events of one stream."""

    def chunk(self, choice: Choice, output: Output) -> Iterable[str]:
        """Events in parts, to be taken before the next ones are asked for; none when the output has nothing to show yet."""
        ...

    def last_events(self) -> list[str]:
        """What ends a stream whose choices have ended."""
        ...

    def broken(self, problem: Problem) -> str:
        """What ends a stream that cannot go on."""
        ...


class Shape(Protocol):
    """How one endpoint writes its answers."""

    is_counted: bool
    """Its streams are written token by token, and their events counted (router/api/event_ids.py)."""

    def writer(self, progress: JobProgress) -> StreamWriter:
        """Of this job's stream."""
        ...

    def whole(self, progress: JobProgress) -> dict[str, Any]:
        """The answer of a finished job, for `sse.to_json` or, where it is long, `sse.json_parts`."""
        ...


class ChunkShape(Protocol):
    """How an endpoint of OpenAI's older kind writes its JSON."""

    @property
    def shows_text_alone(self) -> bool:
        """Of the pieces of a choice between its first and its last one, only the text differs."""
        ...

    def head(self) -> str:
        """A chunk up to the opening bracket of its choices."""
        ...

    def first_piece(self, choice: Choice, output: Output) -> Iterable[str]:
        """The entry of `choices` that shows a choice's first output; may be long."""
        ...

    def piece(self, choice: Choice, output: Output) -> str:
        """The entry of `choices` that shows a later output; empty when there is nothing to show yet."""
        ...

    def extras(self, choice: Choice) -> Iterable[str]:
        """Top-level fields of a choice's first chunk, each with a leading comma; may be long."""
        ...


def usage_and_trace(job: Job, progress: JobProgress) -> dict[str, Any]:
    """What an answer of OpenAI's older kind ends with."""
    return {"usage": progress.usage()} | ({"baton": progress.trace()} if job.trace else {})
