"""What a router and a worker say to each other on one Attach stream, and the router's end of it. Knows no gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from workers.request import FinishReason, Output, Request
from workers.status import KvEvent, Load, PrefixHint, Role, WorkerAddress, WorkerStatus


@dataclass(frozen=True, slots=True)
class RouterHello:
    """The first message on a stream: who attaches."""

    router_id: str


@dataclass(frozen=True, slots=True)
class Migration:
    """Where a sequence runs that is to go on elsewhere; `request_id` is its name on the wire there.

    `permit` shows the source that its router wants it so (workers/trust/permits.py).
    """

    source: WorkerAddress
    request_id: str
    permit: bytes = b""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a worker keeps beside a request, for routers that have not sent it. A job is what one client sent: it has several
    requests where that has several choices or prompts."""

    job: str
    num_requests: int = 1
    """That the job has in all."""
    ticket: bytes = b""
    """What it takes to write the job's answer anew; routers alone can read it. With the job's first request only."""
    is_background: bool = False
    """No client waits for it: it goes on without a router for as long as it takes."""
    owner: int = 0
    """A number of whoever asked for it, below 2**64: what is kept is shared out among owners."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a request. `generation` is the decode worker's as the router knows it.

    `prefill_workers` are to be tried in this order; none: the decode worker computes the prompt itself. `remaining_s` is left
    of the request's life and `first_token_s` until its first token is due, 0: no bound. With `migration` the worker takes a
    running sequence over instead, or refuses; `replay_token_ids` are then what the client has of it.
    """

    request: Request
    generation: int
    prefill_workers: tuple[WorkerAddress, ...] = ()
    remaining_s: float = 0.0
    first_token_s: float = 0.0
    migration: Migration | None = None
    prefix: PrefixHint | None = None
    """For whoever computes the prompt: where its beginning can be had."""
    name: str = ""
    """The request's own, the same for each attempt (`request.request_id` names the attempt); empty: there is one attempt only."""
    key: bytes = b""
    """Of this attempt: who has a permit made with it may take it over."""
    kept: Kept | None = None
    """None: nobody will ask for it by its job."""
    cached_tokens: int = 0
    """Of the prompt, as an earlier attempt has said."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a request; it gets no further output. With `lets_go` it goes on for a grace, as one whose router is lost."""

    request_id: str
    lets_go: bool = False


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take the request called `name` up, which runs at the worker or has ended there unheard, and hear of it as `request_id`.

    Its outputs come from position `position` on, the number of output tokens that the client has. When they are not kept any
    more, or it is not there, the answer is an error with NOT_KEPT; whoever heard of it before is told TAKEN_UP. `key` is as in
    Submit, in place of the one that it had. With `joins` whoever heard of it goes on hearing of it, and
    it stays his; outputs that are not kept any more may come as tokens without their text.
    """

    name: str
    request_id: str
    position: int
    key: bytes = b""
    joins: bool = False


@dataclass(frozen=True, slots=True)
class Find:
    """Say what is here of a job, as Found with this number. `ends`: stop what runs of it and keep nothing of it any more; with `relays` tell
    the other routers, at which it may wait, too."""

    number: int
    job: str
    ends: bool = False
    relays: bool = False


@dataclass(frozen=True, slots=True)
class Waits:
    """A job of so many requests waits at this router for a worker: whoever asks for it is to be told so. 0 requests: it waits no more."""

    job: str
    num_requests: int = 0
    ticket: bytes = b""
    """As of Kept."""


@dataclass(frozen=True, slots=True)
class FoundRequest:
    """One request of a job, as far as it is at a worker."""

    name: str
    num_prompt_tokens: int
    num_tokens: int
    """Said so far."""
    cached_tokens: int
    finish_reason: FinishReason | None
    """None: it runs."""
    is_whole: bool
    """Everything from its first token on can be had there."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a worker has of a job; without requests: nothing."""

    number: int
    requests: tuple[FoundRequest, ...] = ()
    num_requests: int = 0
    ticket: bytes = b""
    is_waiting: bool = False
    """A router has said that some of it waits there."""


@dataclass(frozen=True, slots=True)
class DumpRequest:
    """Send the whole set of prefix-cache hashes again, as a KvEvent with `reset`."""


WorkerMessage = Submit | Cancel | Adopt | Find | Waits | DumpRequest
"""What a worker is told once a router has said who it is."""

RouterMessage = RouterHello | WorkerMessage


class WorkerFrame(NamedTuple):
    """What one engine step of a worker means for one router. A tuple, as Output is: one is made for every step.

    `load` None: unchanged. `status` comes with the first frame, after a role switch, and about once a second.
    """

    generation: int
    outputs: tuple[Output, ...] = ()
    load: Load | None = None
    kv_events: tuple[KvEvent, ...] = ()
    status: WorkerStatus | None = None
    found: tuple[Found, ...] = ()
    ended_jobs: tuple[str, ...] = ()
    """That another router has ended."""


class WorkerLink(Protocol):
    """One attached stream to one worker. Used from one event loop."""

    def frames(self) -> AsyncIterator[WorkerFrame]:
        """Frames in order; raises WorkerLost, once, when the stream ends for any reason but `close`."""
        ...

    def send(self, message: WorkerMessage) -> bool:
        """Queues a message, without waiting. False: the queue is full or the link is gone, nothing was queued."""
        ...

    async def finish(self) -> None:
        """Has what was queued written, and says no more. `frames` end when the worker has taken it in; returns before, and soon."""
        ...

    async def close(self) -> None: ...


class WorkerClient(Protocol):
    """Reaches workers."""

    def attach(self, worker: WorkerAddress, router_id: str) -> WorkerLink:
        """Starts a stream, without waiting; a failure shows in the link's frames."""
        ...

    async def set_role(self, worker: WorkerAddress, role: Role, generation: int = 0) -> WorkerStatus:
        """Asks for a role switch; `generation` 0 means any. Raises WorkerLost, Refused or InvalidRequest."""
        ...

    async def set_draining(self, worker: WorkerAddress, is_draining: bool, generation: int = 0) -> WorkerStatus:
        """Has the worker take no new work, or take it again. Raises WorkerLost, Refused."""
        ...

    async def describe(self, worker: WorkerAddress) -> WorkerStatus:
        """Raises WorkerLost."""
        ...
