"""/v1/responses: OpenAI's newer API, whole and as a stream of its events; the last answers are kept, and can be gone on from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from starlette.types import Scope

from router.api.answer import Answer, whole
from router.api.asking import AnswerKind, Inquiry, Reading, read_asked, read_ticket
from router.api.background import BackgroundJobs
from router.api.callers import owner_of
from router.api.job_progress import JobProgress
from router.api.problems import Problem, Rejected, rejected
from router.api.response_shape import ResponseShape, input_items
from router.api.responses_body import ResponsesBody, as_chat, echoed
from router.api.schema import parse_body
from router.api.services import Services
from router.api.shapes import Shape
from router.api.sse import to_json
from router.api.tickets import Ticket
from router.api.translate import Job, translate_chat
from router.job_part import FoundJob
from workers.errors import InvalidRequest, Refusal


def response_routes(services: Services) -> APIRouter:
    routes = APIRouter()
    store, background = services.responses, BackgroundJobs(services, _keep_end)

    def on_job_ended(job_id: str) -> None:
        background.forget(job_id)  # it may not have stored it yet
        store.forget(f"resp_{job_id}")

    services.backend.on_job_ended = on_job_ended

    async def find(response_id: str, scope: Scope, waits: bool = False) -> tuple[Inquiry, FoundJob] | None:
        """What workers have of a response, or what waits of it here; with `waits` until a worker has it."""
        job_id = response_id.removeprefix("resp_")
        found = await services.seeker.find(job_id, waits) if len(job_id) == _ID_LETTERS else FoundJob()
        ticket = Ticket.read(found.ticket)
        if ticket is None or ticket.owner != owner_of(scope) or ticket.kind != RESPONSE.name or not ticket.body:
            return None
        return await read_ticket(services, RESPONSE, ticket, scope, is_stream=False), found

    async def fetch(response_id: str, scope: Scope) -> bool:
        """Takes over what another router has made, or this one in the background."""
        there = await find(response_id, scope)
        if there is None or not _has_ended(*there) or background.is_running(there[0].job.job_id):
            return False
        await whole(services, *there)
        return True

    @routes.post("/v1/responses", response_model=None)
    async def create_response(http: HttpRequest) -> Response:
        async def fetch_earlier(error: Rejected) -> bool:
            if not isinstance(error, UnknownResponse):
                return False
            return await fetch(error.response_id, http.scope)

        asked = await read_asked(http, services, RESPONSE, fetch_earlier)
        after = http.headers.get("last-event-id", "")
        if not asked.is_background:
            return Answer(services, asked, after)
        async with services.seeker.turn(asked):
            found = await services.seeker.look(asked, waits=False)
            if found is None:
                await background.begin(asked, http.scope)
        if asked.job.stream:
            return Answer(services, asked, after, await services.seeker.find(asked.job.job_id))
        if found is None:
            return _json(_shape(asked).response("queued", []))
        return await show(_id_of(asked), http.scope)

    async def show(response_id: str, scope: Scope) -> Response:
        """As far as it has come."""
        stored = store.get(response_id, owner_of(scope))
        if stored is None and await fetch(response_id, scope):
            stored = store.get(response_id, owner_of(scope))
        if stored is not None:
            return _json(stored.response)
        there = await find(response_id, scope)
        if there is None:
            raise UnknownResponse(response_id)
        asked, found = there
        return _json(_shape(asked).response("in_progress" if found.requests else "queued", []))

    @routes.delete("/v1/responses/{response_id}", response_model=None)
    async def delete_response(http: HttpRequest, response_id: str) -> Response:
        owner = owner_of(http.scope)
        there = await find(response_id, http.scope)
        if not store.delete(response_id, owner) and there is None:
            raise UnknownResponse(response_id)
        job_id = response_id.removeprefix("resp_")
        background.forget(job_id)
        await services.backend.find(job_id, ends=True)  # other routers may have told it, too
        return _json({"id": response_id, "object": "response.deleted", "deleted": True})

    @routes.get("/v1/responses/{response_id}", response_model=None)
    async def show_response(http: HttpRequest, response_id: str) -> Response:
        if http.query_params.get("stream") != "true":
            return await show(response_id, http.scope)
        there = await find(response_id, http.scope, waits=True)
        if there is None:
            is_stored = store.get(response_id, owner_of(http.scope)) is not None
            raise UnknownResponse(response_id, "the events of" if is_stored else "")
        asked = await read_ticket(services, RESPONSE, there[0].ticket, http.scope, is_stream=True)
        return Answer(services, asked, http.query_params.get("starting_after", ""), there[1])

    @routes.post("/v1/responses/{response_id}/cancel", response_model=None)
    async def cancel_response(http: HttpRequest, response_id: str) -> Response:
        owner = owner_of(http.scope)
        there = await find(response_id, http.scope)
        stored = store.get(response_id, owner)
        if there is None and stored is None:
            raise UnknownResponse(response_id)
        if not (there[0].is_background if there is not None else stored is not None and stored.response["background"]):
            raise InvalidRequest("only responses that run in the background can be cancelled", "response_id")
        if there is None or stored is not None or _has_ended(*there):
            return await show(response_id, http.scope)
        asked, _ = there
        background.forget(asked.job.job_id)
        await services.backend.find(asked.job.job_id, ends=True)
        return _json(_shape(asked).cancelled())

    @routes.get("/v1/responses/{response_id}/input_items", response_model=None)
    async def list_input_items(http: HttpRequest, response_id: str) -> Response:
        owner = owner_of(http.scope)
        stored = store.get(response_id, owner)
        there = await find(response_id, http.scope) if stored is None else None
        if stored is None and there is None:
            raise UnknownResponse(response_id)
        items = stored.input_items if stored is not None else _shape(there[0]).input_items if there is not None else []
        ends = (
            {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
        )
        return _json({"object": "list", "data": items, **ends, "has_more": False})

    return routes


_ID_LETTERS = 32


class UnknownResponse(Rejected):
    """Neither this router nor a worker has it for whoever asks."""

    def __init__(self, response_id: str, what: str = "", param: str = "response_id") -> None:
        error = rejected(
            404, "response_not_found", f"there is no response {response_id!r:.80} here, or not any more", param
        )
        if what:
            error = rejected(
                404, "response_not_found", f"{what} {response_id!r:.80} are kept no more; ask without stream", param
            )
        super().__init__(error.problem)
        self.response_id = response_id


def _has_ended(asked: Inquiry, found: FoundJob) -> bool:
    names = [request.request_id for request in asked.job.requests]
    return all(name in found.requests and found.requests[name][1].finish_reason is not None for name in names)


def _id_of(asked: Inquiry) -> str:
    return f"resp_{asked.job.job_id}"


def _keep_end(asked: Inquiry, progress: JobProgress, problem: Problem | None) -> None:
    """What came of a response of the background, for who asks for it."""
    shape = _shape(asked)
    if problem is None:
        shape.whole(progress)
    elif problem.code != Refusal.CANCELLED:  # by another router, which knows whether it was deleted
        shape.failed(problem)


def _shape(asked: Inquiry) -> ResponseShape:
    assert isinstance(asked.shape, ResponseShape)
    return asked.shape


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")


def _read(raw: bytes, reading: Reading) -> tuple[Job, Callable[[Job], Shape]]:
    body, store, owner = parse_body(ResponsesBody, raw), reading.responses, reading.owner
    if body.previous_response_id is not None and reading.earlier is None:
        stored = store.get(body.previous_response_id, owner)
        if stored is None:
            raise UnknownResponse(body.previous_response_id, param="previous_response_id")
        reading.earlier = stored.messages
    chat, messages = as_chat(body, reading.earlier or [])
    reading.is_background = bool(body.background)
    job = translate_chat(chat, reading.model, reading.tokenizer, reading.config, reading.naming)
    echo = echoed(body) | {"background": bool(body.background)}
    return job, lambda job: ResponseShape(job, messages, echo, input_items(body), store, owner)


RESPONSE = AnswerKind("response", _read)
