"""Runs one job and sends its answer, whole or as a stream; the endpoints' shapes say what the JSON looks like."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

from fastapi import Response
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from router.api import sse
from router.api.asking import Inquiry, as_first_asked
from router.api.beam_requests import Searches
from router.api.beam_run import BeamOutputs
from router.api.callers import Account
from router.api.event_ids import MAX_NUMBERED_CHOICES, CountIds, EventIds, NoIds, PositionIds
from router.api.job_outputs import JobOutputs, unless_disconnected
from router.api.job_progress import Choice, JobProgress
from router.api.problems import describe, note_refusal
from router.api.retelling import Retelling
from router.api.services import Services
from router.api.translate import Job
from router.direct import DIRECT, DirectWriter
from router.job_part import FoundJob, JobPart
from router.policies.explain import route_of
from router.wishes import Wishes
from workers.errors import InvalidRequest, Refusal
from workers.request import FinishReason, Output, Request
from workers.tracing import clean_traceparent, start_span

_log = logging.getLogger(__name__)

_MAX_ENTRIES_AT_ONCE = 1000
"""Tokens and logprobs that the event loop writes itself."""
_ENTRIES_PER_CHOICE = 4
"""That a choice's other fields take as long to write as."""
_EVENTS_AT_ONCE = 1024
"""Parts of events that are kept for one write, of an answer that is told again."""
_BODY_CHARACTERS = 1 << 17
"""Of a long answer, at least so many are sent at once."""


async def whole(services: Services, asked: Inquiry, found: FoundJob) -> dict[str, Any]:
    """The whole answer of a job that was found, once it has ended."""
    answer = Answer(services, asked, found=found)
    answer._number(found)
    requests, parts = asked.requests(found)
    start_s = time.monotonic()
    generation = await JobOutputs.open(services.backend, requests, None, asked.job.wishes, parts)
    progress = JobProgress(asked.job, services.metrics, start_s, generation.decisions)
    try:
        await answer._gather(generation, progress)
        return asked.shape.whole(progress)
    finally:
        progress.abandon()
        generation.close()


class Answer(Response):
    """Sends a job's answer. Everything starts and ends inside the call, so no stream of the backend can be left open."""

    def __init__(self, services: Services, asked: Inquiry, after: str = "", found: FoundJob | None = None) -> None:
        """`after`: the id of the last event that the client has. With `found` the job is taken up where it is."""
        super().__init__()
        self._services = services
        self._asked = asked
        self._job, self._shape = asked.job, asked.shape
        self._after = after
        self._found = found
        self._ids: EventIds = NoIds()
        self._retellings: list[Retelling] = []
        """Of the choices, where what they say is to be told in other pieces than it comes in."""
        self._is_sent = False
        """The last of it is on its way."""
        self._left: JobOutputs | None = None
        """What goes on when its client has gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seeker, outcome = self._services.seeker, Refusal.INTERNAL.value
        async with AsyncExitStack() as begun:
            await begun.enter_async_context(seeker.turn(self._asked))
            self._found = self._found or await seeker.look(self._asked)
            if self._found is not None:
                self._asked = await as_first_asked(self._services, self._asked, self._found, scope)
                self._job, self._shape = self._asked.job, self._asked.shape
            is_joined, goes_on = self._asked.is_there(self._found), self._asked.goes_on
            with self._services.unattended.giving_place(self._job.job_id):
                account = await self._services.callers.admit(self._job, scope, is_joined, goes_on)
            begun = begun.pop_all()
        try:
            run = self._run(begun, account, scope, receive, send)
            await unless_disconnected(receive, run, lambda: self._is_sent)
            outcome = scope["state"].get("refusal", "") or "ok"
        except ClientDisconnect:
            outcome = "client_disconnected"
            raise
        except Exception as error:
            outcome = describe(error).label
            raise
        finally:
            await begun.aclose()  # a client that left at once
            if self._left is not None and account.progress is not None:
                self._services.unattended.take(self._left, account.progress, account)
            else:
                account.close(outcome)

    async def _run(self, begun: AsyncExitStack, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        services, job, found = self._services, self._job, self._found
        start_s = time.monotonic()
        async with begun:  # until all is submitted
            self._number(found)
            heartbeat_s = services.config.heartbeat_s if job.stream else None
            attributes = {"job": job.job_id, "model": job.model, "choices": len(job.requests)}
            span = start_span(
                "request", clean_traceparent(Headers(scope=scope).get("traceparent", "")), start_s, attributes
            )
            requests, parts = self._asked.requests(found)
            if span.traceparent:
                requests = tuple(replace(request, traceparent=span.traceparent) for request in requests)
            try:
                wishes = replace(job.wishes, explain=True) if span.traceparent else job.wishes
                generation = await self._open(requests, heartbeat_s, wishes, parts)
            except BaseException as error:
                span.end(repr(error))
                raise
        progress = account.progress = JobProgress(
            job, services.metrics, start_s, generation.decisions, span.traceparent
        )
        scope["state"]["work"] = progress
        try:
            if job.stream:
                await self._send_stream(generation, progress, scope, send)
            else:
                await self._send_whole(generation, progress, scope, receive, send)
        except (asyncio.CancelledError, ClientDisconnect):
            # What runs in the background has its own reader, or goes on at its worker.
            if isinstance(generation, JobOutputs) and self._asked.goes_on and not self._asked.is_background:
                self._left = None if generation.has_ended else generation
            raise
        finally:
            span.set(completion_tokens=progress.completion_tokens, **route_of(generation.decisions()))
            span.end("not finished" if progress.num_unfinished else "")
            if self._left is None:
                progress.abandon()
                generation.close()

    async def _open(
        self, requests: tuple[Request, ...], heartbeat_s: float | None, wishes: Wishes, parts: tuple[JobPart, ...]
    ) -> JobOutputs | BeamOutputs:
        services, job = self._services, self._job
        if job.beams is None:
            return await JobOutputs.open(services.backend, requests, heartbeat_s, wishes, parts)
        model = services.backend.model
        assert model is not None, "the job was read for a model"
        searches = Searches(job.beams, requests, job.logprobs or 0)
        return BeamOutputs(searches, services.backend, services.tokenizer, model.max_model_len, wishes)

    def _number(self, found: FoundJob | None) -> None:
        """Chooses how events are numbered, and makes what it takes to tell them from where the client has come to."""
        job, services = self._job, self._services
        if not job.stream:
            self._ids = NoIds()
        elif self._shape.is_counted:
            self._ids = CountIds(self._after)
        elif len(job.requests) <= MAX_NUMBERED_CHOICES:
            self._ids = PositionIds(len(job.requests), self._after)
        elif self._after:
            raise InvalidRequest(f"streams of more than {MAX_NUMBERED_CHOICES} choices cannot be had in part", "after")
        model = services.backend.model
        if model is not None and (found is not None or self._after or (job.stream and self._shape.is_counted)):
            self._retellings = [
                Retelling(request, services.tokenizer, model.max_model_len, found is None) for request in job.requests
            ]

    async def _pieces(self, batch: Sequence[tuple[int, Output]]) -> AsyncIterator[tuple[int, Output]]:
        """Of a batch, where outputs are to be told in other pieces than they come in."""
        for index, output in batch:
            if output.finish_reason is FinishReason.ERROR:
                yield index, output
                continue
            async for piece in self._retellings[index].pieces(output):
                yield index, piece

    async def _send_whole(
        self, generation: JobOutputs | BeamOutputs, progress: JobProgress, scope: Scope, receive: Receive, send: Send
    ) -> None:
        await self._gather(generation, progress)
        answer = self._shape.whole(progress)
        if not is_long(self._job, progress.choices):
            response = Response(sse.to_json(answer).encode(), media_type="application/json")
            self._is_sent = True
            await response(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        async for body in _bodies(sse.json_parts(answer)):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        self._is_sent = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _gather(self, generation: JobOutputs | BeamOutputs, progress: JobProgress) -> None:
        while progress.num_unfinished:
            batch = await generation.next_batch()
            if self._retellings:
                async for index, piece in self._pieces(batch):
                    progress.accept(index, piece, time.monotonic())
                continue
            for index, output in batch:
                progress.accept(index, output, time.monotonic())

    async def _send_stream(
        self, generation: JobOutputs | BeamOutputs, progress: JobProgress, scope: Scope, send: Send
    ) -> None:
        """Headers go out with the first output or heartbeat; a failure before that has its own HTTP status."""
        is_open = False

        async def transmit(body: bytes, more: bool = True) -> None:
            nonlocal is_open
            if not is_open:
                is_open = True
                await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
            self._is_sent = not more
            await send({"type": "http.response.body", "body": body, "more_body": more})
            generation.wrote()

        writer, ids = self._shape.writer(progress), self._ids
        connection: DirectWriter | None = scope.get("extensions", {}).get(DIRECT)

        def show(index: int, output: Output) -> bool:
            """Writes what comes in the middle of an answer at once. The beginning and the end go through every ASGI layer."""
            is_middle = output.finish_reason is None and progress.choices[index].is_announced
            if connection is None or self._retellings or not (is_middle and connection.is_open):
                return False
            choice, shown = progress.accept(index, output, time.monotonic())
            chunk = ids.mark(choice, writer.chunk(choice, shown))
            if body := "".join(chunk).encode():
                connection.write(body)
                generation.wrote()
            return True

        chunks: list[str] = []

        async def tell(index: int, output: Output, now_s: float) -> None:
            nonlocal chunks
            choice, shown = progress.accept(index, output, now_s)
            is_first = not choice.is_announced
            chunk = ids.mark(choice, writer.chunk(choice, shown))
            if is_first and chunk and is_long(self._job, (choice,)):
                before, chunks = chunks, []
                async for body in _bodies(chain(before, chunk)):
                    await transmit(body)
            else:
                chunks += chunk

        try:
            while progress.num_unfinished:
                batch = await generation.next_batch(show)
                now_s = time.monotonic()
                if self._retellings:
                    async for index, piece in self._pieces(batch):
                        await tell(index, piece, now_s)
                        if len(chunks) >= _EVENTS_AT_ONCE and progress.num_unfinished:
                            body, chunks = "".join(chunks).encode(), []
                            await transmit(body)
                else:
                    for index, output in batch:
                        await tell(index, output, now_s)
                body, chunks = "".join(chunks).encode(), []
                if not body and generation.is_heartbeat_due:
                    body = sse.HEARTBEAT
                if body and progress.num_unfinished:
                    await transmit(body)
            await transmit(body + ids.last(writer.last_events()).encode(), more=False)
        except OSError as error:
            raise ClientDisconnect from error
        except Exception as error:
            if not is_open:
                raise
            problem = describe(error)
            note_refusal(scope, problem)
            if problem.row.status >= 500:
                job = self._job.job_id
                _log.warning("a stream of job %s broke", job, exc_info=error, extra={"request_id": job})
            generation.close()
            await transmit(writer.broken(problem).encode(), more=False)


def is_long(job: Job, choices: Iterable[Choice]) -> bool:
    """Whether what is to be written of these choices, as far as they have come, takes so long that a thread should write it."""
    per_token = (0 if job.logprobs is None else job.logprobs + 2) + job.return_token_ids
    per_prompt_token = (0 if job.prompt_logprobs is None else job.prompt_logprobs + 2) + job.return_token_ids
    if job.echo:
        per_prompt_token += 1 if job.logprobs is None else job.logprobs + 2
    num_entries = sum(
        _ENTRIES_PER_CHOICE + len(choice.prompt.token_ids) * per_prompt_token + choice.num_tokens * per_token
        for choice in choices
    )
    return num_entries > _MAX_ENTRIES_AT_ONCE


async def _bodies(parts: Iterable[str]) -> AsyncIterator[bytes]:
    """The parts, several in one, written by a thread as they are asked for."""
    rest = iter(parts)

    def gather() -> bytes:
        gathered: list[str] = []
        num_characters = 0
        for part in rest:
            gathered.append(part)
            num_characters += len(part)
            if num_characters >= _BODY_CHARACTERS:
                break
        return "".join(gathered).encode()

    while body := await asyncio.to_thread(gather):
        yield body
