"""Which part of which client's job a request is, what workers keep of it, and where it is already."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.wire.attach import FoundRequest, Kept


@dataclass(frozen=True, slots=True)
class JobPart:
    """Workers hear of `kept` alone."""

    kept: Kept | None = None
    name: str = ""
    """The request's own, by which every router and worker knows it; empty: its id. Ids are one router's."""
    lets_go: bool = False
    """When this router ends, or its reader is too slow, it goes on at its worker for a while: the client may come back. In the background
    also when its reader leaves."""
    at: str = ""
    """The worker where it runs, or has ended, already: there it is taken up from its first token on. Empty: it is to be run."""


NO_JOB = JobPart()


@dataclass(frozen=True, slots=True)
class FoundJob:
    """What the workers have of a job; nothing at all where `requests` is empty."""

    ticket: bytes = b""
    """Empty: its first request, which has it, was not found, nor does it wait anywhere."""
    requests: dict[str, tuple[str, FoundRequest]] = field(default_factory=dict)
    """By name, each with the worker that has most of it."""
    is_waiting: bool = False
    """Some of it waits at a router for a worker."""
