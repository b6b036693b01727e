"""Reads what a client asks for into a job and the form of its answer; finds jobs that another router, or this one, runs already."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest
from starlette.datastructures import Headers
from starlette.types import Scope

from router.api.callers import owner_of
from router.api.naming import Naming, job_of_key, key_in
from router.api.offload import offload
from router.api.problems import Rejected, rejected
from router.api.prompts import check_token_ids
from router.api.response_store import ResponseStore
from router.api.tickets import Ticket
from router.api.translate import Job
from router.api.turns import with_prompt
from router.backend import Backend
from router.config import ApiConfig
from router.job_part import FoundJob, JobPart
from workers.errors import InvalidRequest, Refusal, Refused
from workers.kv_cache.block_hash import PromptTokens
from workers.request import Request
from workers.status import ModelInfo
from workers.text.tokenizer import Tokenizer
from workers.wire.attach import Kept

if TYPE_CHECKING:
    from router.api.services import Services
    from router.api.shapes import Shape

CREATED_HEADER = "x-baton-created"
"""When a client first sent a request that it sends again: its answer says so, and is the same byte for byte."""
WAIT_S = 0.1
MOST_WAIT_S = 0.5
"""Between two questions to all workers."""
MAX_WAIT_S = 60.0
"""How long a request that is sent again waits for the first one, which waits for a worker."""


@dataclass(slots=True)
class Reading:
    """What a body is read with."""

    naming: Naming
    owner: str
    model: ModelInfo | None
    tokenizer: Tokenizer
    config: ApiConfig
    responses: ResponseStore
    earlier: list[dict[str, Any]] | None = None
    """The conversation that it goes on from. Whoever finds it by the body's own words sets it."""
    is_background: bool = False
    """The body wants no answer to wait for; who reads it sets this."""


@dataclass(frozen=True, slots=True)
class AnswerKind:
    """An endpoint that answers. `read` makes a job of a body, and of the job, once it is final, the form of its answer."""

    name: str
    read: Callable[[bytes, Reading], tuple[Job, Callable[[Job], Shape]]]


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What a client asks for. `key`: its own name for it; empty: it gave none."""

    kind: AnswerKind
    job: Job
    shape: Shape
    ticket: Ticket
    written: bytes
    """The ticket, as workers keep it."""
    key: str = ""
    is_background: bool = False
    is_followed: bool = False
    """It was asked for by its id: whoever did may do so again, and may be its only reader by now."""

    @property
    def goes_on(self) -> bool:
        """It runs on when its client has gone, who may come back to it. Nobody can come back to beams: workers keep none."""
        return self.job.beams is None and (bool(self.key) or self.is_background or self.is_followed)

    def is_there(self, found: FoundJob | None) -> bool:
        """Nothing of it has to be computed again."""
        names = [request.request_id for request in self.job.requests]
        return found is not None and all(name in found.requests and found.requests[name][1].is_whole for name in names)

    def requests(self, found: FoundJob | None) -> tuple[tuple[Request, ...], tuple[JobPart, ...]]:
        """What is to be run, or to be taken up where it was found. One name may be run by several routers: ids differ."""
        job, requests = self.job, list[Request]()
        parts: list[JobPart] = []
        is_named = bool(self.key) or found is not None
        for request in job.requests:
            name, at = request.request_id, ""
            if found is not None and name in found.requests and found.requests[name][1].is_whole:
                at, _ = found.requests[name]
            ticket = b"" if parts else self.written
            kept = Kept(job.job_id, len(job.requests), ticket, self.is_background, self.ticket.owner_number)
            requests.append(replace(request, request_id=f"{name}~{secrets.token_hex(4)}") if is_named else request)
            parts.append(JobPart(kept, name, self.goes_on, at))
        return tuple(requests), tuple(parts)


async def read_asked(
    http: HttpRequest,
    services: Services,
    kind: AnswerKind,
    fetch: Callable[[Rejected], Awaitable[bool]] | None = None,
) -> Inquiry:
    """Reads, checks and tokenizes one request; one that is not short in a thread. `fetch` may get what it was rejected for want
    of; then it is read again."""
    owner, key = owner_of(http.scope), key_in(http.headers, services.config)
    if http.headers.get("last-event-id") and not key:
        raise InvalidRequest(
            "a new request has no events to go on from: send Last-Event-ID with the Idempotency-Key that the request was first sent with, "
            "or ask GET /v1/requests/{id}/stream for the rest",
            "Last-Event-ID",
        )
    naming = Naming.new(job_of_key(owner, key) if key else "")
    if key and (created := _created(http.headers)):
        naming = replace(naming, created=created)
    async with services.bodies.receive(http) as raw:
        try:
            return await read_body(services, kind, raw, owner, naming, http.scope, key, is_new=not key)
        except Rejected as error:
            if fetch is None or not await fetch(error):
                raise
        return await read_body(services, kind, raw, owner, naming, http.scope, key, is_new=not key)


def _created(headers: Headers) -> int:
    text = headers.get(CREATED_HEADER, "")
    if text and not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise InvalidRequest(f"{CREATED_HEADER} is a time in whole seconds since 1970", CREATED_HEADER)
    return int(text or 0)


async def read_ticket(
    services: Services, kind: AnswerKind, ticket: Ticket, scope: Scope, is_stream: bool | None = None
) -> Inquiry:
    """What somebody has asked for before. `is_stream`: how it is to be answered now."""
    asked = await read_body(
        services, kind, ticket.body, ticket.owner, ticket.naming, scope, earlier=ticket.earlier, is_stream=is_stream,
        prompt=ticket.prompt,
    )  # fmt: skip
    return replace(asked, is_followed=True)


async def read_body(
    services: Services,
    kind: AnswerKind,
    raw: bytes,
    owner: str,
    naming: Naming,
    scope: Scope,
    key: str = "",
    earlier: list[dict[str, Any]] | None = None,
    is_stream: bool | None = None,
    is_new: bool = False,
    prompt: tuple[int, ...] = (),
) -> Inquiry:
    """`is_new`: it may go on from a turn that is remembered here; its ticket then tells other routers its prompt, which they give as
    `prompt`."""
    model = services.backend.model
    reading = Reading(naming, owner, model, services.tokenizer, services.config, services.responses, earlier)

    def build() -> tuple[Job, Callable[[Job], Shape], Ticket, bytes]:
        job, make_shape = kind.read(raw, reading)
        if is_stream is not None:
            if is_stream and job.num_best:
                raise InvalidRequest(
                    "a request with best_of above n has no stream: the best are known when all have ended"
                )
            job = replace(job, stream=is_stream)
        own_prompt: tuple[int, ...] = ()
        if is_new and model is not None and services.turns.max_bytes:
            plain = job.prompts[0].token_ids
            job = services.turns.splice(job, owner.encode(), model)
            own_prompt = job.prompts[0].token_ids if job.prompts[0].token_ids is not plain else ()
        elif prompt and model is not None:
            own_prompt = PromptTokens(check_token_ids(prompt, model.vocab_size, "messages"))
            job = with_prompt(job, own_prompt)
        digest = hashlib.sha256(raw).hexdigest()
        ticket = Ticket(kind.name, owner, naming, digest, raw, reading.earlier, own_prompt)
        return job, make_shape, ticket, ticket.write()

    # EBNF is turned into Lark's language in Python, a character at a time. What is long goes to a thread without a look at it here.
    inline_bytes = services.config.offload_bytes
    if len(raw) <= inline_bytes and (b"grammar" in raw or b"ebnf" in raw):
        inline_bytes = 0
    read = await offload(build, len(raw), inline_bytes)
    job, make_shape, ticket, written = read
    job = services.callers.own(job, scope)
    if model is not None and job.speech.wanted is not None:
        await services.grammars.check(job, job.speech.wanted, model)
    return Inquiry(kind, job, make_shape(job), ticket, written, key, reading.is_background)


class Seeker:
    """Finds what runs already under the key that a request was sent with. Used by one event loop."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def turn(self, asked: Inquiry) -> AsyncIterator[None]:
        """Of several requests with one key the next looks when the one before has been submitted."""
        if not asked.key:
            yield
            return
        job = asked.job.job_id
        lock, num_users = self._turns.get(job, (asyncio.Lock(), 0))
        self._turns[job] = lock, num_users + 1
        try:
            async with lock:
                yield
        finally:
            _, num_users = self._turns[job]
            self._turns[job] = lock, num_users - 1
            if num_users == 1:
                del self._turns[job]

    async def find(self, job: str, waits: bool = True) -> FoundJob:
        """Where a job is; with `waits` one that waits here for a worker is waited for."""
        found = await self._backend.find(job)
        waited_s, wait_s = 0.0, WAIT_S
        while waits and not found.requests and found.is_waiting:
            if waited_s >= MAX_WAIT_S:
                raise Refused(Refusal.QUEUE_FULL, "the request still waits for a worker; ask again later", 1.0)
            await asyncio.sleep(wait_s)
            waited_s, wait_s = waited_s + wait_s, min(MOST_WAIT_S, 1.5 * wait_s)
            found = await self._backend.find(job)
        return found

    async def look(self, asked: Inquiry, waits: bool = True) -> FoundJob | None:
        """None: nobody has it, or nobody knows any more what it was. Raises Rejected when another body was sent with this key, or to
        another endpoint."""
        if not asked.key:
            return None
        found = await self.find(asked.job.job_id, waits)
        ticket = Ticket.read(found.ticket)
        if ticket is None or not (found.requests or found.is_waiting):
            return None
        if (ticket.kind, ticket.digest) != (asked.kind.name, asked.ticket.digest):
            raise rejected(
                422,
                "idempotency_key_reused",
                "another request was sent with this Idempotency-Key: send the same body to the same endpoint, or choose a new key",
                "Idempotency-Key",
            )
        return found


async def as_first_asked(services: Services, asked: Inquiry, found: FoundJob, scope: Scope) -> Inquiry:
    """With the time at which it was first asked for: the answer says it."""
    ticket = Ticket.read(found.ticket)
    if ticket is None or ticket.naming == asked.ticket.naming:
        return asked
    body = asked.ticket.body
    return await read_body(
        services, asked.kind, body, ticket.owner, ticket.naming, scope, asked.key, asked.ticket.earlier
    )
