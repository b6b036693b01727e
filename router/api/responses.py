"""/v1/responses: OpenAI's newer API, whole and as a stream of its events; the last answers are kept, and can be gone on from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from starlette.types import Scope

from router.api.answer import Answer, whole
from router.api.answer_items import Began, Ended, Item, ItemReader, Kind, Said, items_of
from router.api.asking import AnswerKind, Inquiry, Reading, read_asked, read_ticket
from router.api.background import BackgroundJobs
from router.api.callers import owner_of
from router.api.job_run import JobProgress
from router.api.problems import Problem, Rejected, rejected
from router.api.response_store import ResponseStore, Stored
from router.api.responses_body import ResponsesBody, as_chat, echoed, read_items
from router.api.schema import parse_body
from router.api.services import Services
from router.api.shapes import Shape
from router.api.sse import named_event, to_json
from router.api.tickets import Ticket
from router.api.translate import Job, translate_chat
from router.job_part import FoundJob
from workers.errors import InvalidRequest, Refusal
from workers.request import FinishReason, Output


def response_routes(services: Services) -> APIRouter:
    routes = APIRouter()
    store, background = services.responses, BackgroundJobs(services, _keep_end)
    services.backend.on_job_ended = lambda job_id: store.forget(f"resp_{job_id}")

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
    return job, lambda job: ResponseShape(job, messages, echo, _input_items(body), store, owner)


RESPONSE = AnswerKind("response", _read)


def _input_items(body: ResponsesBody) -> list[dict[str, Any]]:
    items = [{"type": "message", "role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    return [{"id": f"item_{place}", "type": "message", **item} for place, item in enumerate(items)]


class ResponseShape:
    """A response with its list of output items."""

    is_counted = True

    def __init__(
        self,
        job: Job,
        messages: list[dict[str, Any]],
        echo: Mapping[str, Any],
        input_items: list[dict[str, Any]],
        store: ResponseStore,
        owner: str,
    ) -> None:
        """`messages`: the conversation so far; `echo`: what is repeated of the request."""
        self._job = job
        self._messages = messages
        self._echo = echo
        self.input_items = input_items
        self._store = store
        self._owner = owner

    def writer(self, progress: JobProgress) -> ResponseEvents:
        return ResponseEvents(self._job, progress, self)

    def whole(self, progress: JobProgress) -> dict[str, Any]:
        (choice,) = progress.choices
        return self.finished(items_of(self._job, choice), progress)

    def finished(self, items: list[Item], progress: JobProgress) -> dict[str, Any]:
        """The response of an answer that has ended; it is kept unless it was not to be."""
        (choice,) = progress.choices
        is_cut = choice.finish_reason is FinishReason.LENGTH
        output = [
            self.item(place, item, "incomplete" if is_cut and item is items[-1] else "completed")
            for place, item in enumerate(items)
        ]
        response = self.response("incomplete" if is_cut else "completed", output)
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["usage"] = _usage(progress)
        self._keep(response, read_items(output) if response["store"] else [])
        return response

    def broken(self, problem: Problem) -> dict[str, Any]:
        """As it is told to whom it cannot be told any further."""
        error = {"code": problem.code, "message": problem.message}
        return self.response("failed", []) | {"error": error}

    def failed(self, problem: Problem) -> dict[str, Any]:
        """The response of an answer that has failed for good; it is kept as one that is whole."""
        response = self.broken(problem)
        self._keep(response, [])
        return response

    def cancelled(self) -> dict[str, Any]:
        """So that of one that was stopped."""
        response = self.response("cancelled", [])
        self._keep(response, [])
        return response

    def _keep(self, response: dict[str, Any], said: list[dict[str, Any]]) -> None:
        if response["store"]:
            messages = [*self._messages, *said]
            num_bytes = len(to_json(response)) + len(to_json(messages))
            self._store.put(Stored(self._owner, response, self.input_items, messages, num_bytes))

    def response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        job = self._job
        fixed = {
            "id": f"resp_{job.job_id}",
            "object": "response",
            "created_at": job.created,
            "status": status,
            "model": job.model,
        }
        rest = {"output": output, "error": None, "incomplete_details": None, "usage": None}
        return {**fixed, **rest, **self._echo}

    def item(self, place: int, item: Item, status: str) -> dict[str, Any]:
        """As far as it has come."""
        name = f"{self._job.job_id}_{place}"
        match item.kind:
            case Kind.REASONING:
                content = [{"type": "reasoning_text", "text": item.text}] if item.pieces else []
                return {"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": content, "status": status}
            case Kind.TEXT:
                content = [_text_part(item.text)] if item.pieces else []
                return {
                    "id": f"msg_{name}",
                    "type": "message",
                    "role": "assistant",
                    "content": content,
                    "status": status,
                }
            case Kind.CALL:
                call = {"call_id": item.call_id, "name": item.name, "arguments": item.text}
                return {"id": f"fc_{name}", "type": "function_call", **call, "status": status}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponseEvents:
    """Implements StreamWriter: every event numbered, from response.created to what became of it."""

    def __init__(self, job: Job, progress: JobProgress, shape: ResponseShape) -> None:
        self._job = job
        self._progress = progress
        self._shape = shape
        self._reader: ItemReader | None = None
        self._number = 0

    def _event(self, kind: str, **fields: Any) -> str:
        event = named_event({"type": f"response.{kind}", "sequence_number": self._number, **fields})
        self._number += 1
        return event

    def chunk(self, choice: Any, output: Output) -> Iterable[str]:
        if self._reader is None:
            self._reader = ItemReader(self._job, choice)
            response = self._shape.response("in_progress", [])
            yield self._event("created", response=response)
            yield self._event("in_progress", response=response)
        choice.is_announced = True
        for told in self._reader.read(output):
            place = len(self._reader.items) - 1
            is_cut = output.finish_reason is FinishReason.LENGTH
            match told:
                case Began(item=item):
                    yield from self._began(place, item)
                case Said(item=item, text=text):
                    yield self._event(
                        f"{_NAMES[item.kind]}.delta", **self._at(place, item), delta=text, **_logprobs(item)
                    )
                case Ended(item=item):
                    yield from self._ended(place, item, "incomplete" if is_cut else "completed")

    def _at(self, place: int, item: Item) -> dict[str, Any]:
        at = {"item_id": self._shape.item(place, Item(item.kind), "")["id"], "output_index": place}
        return at if item.kind is Kind.CALL else {**at, "content_index": 0}

    def _began(self, place: int, item: Item) -> Iterable[str]:
        yield self._event("output_item.added", output_index=place, item=self._shape.item(place, item, "in_progress"))
        if item.kind is not Kind.CALL:
            part = _text_part("") if item.kind is Kind.TEXT else {"type": "reasoning_text", "text": ""}
            yield self._event("content_part.added", **self._at(place, item), part=part)

    def _ended(self, place: int, item: Item, status: str) -> Iterable[str]:
        at, whole = self._at(place, item), self._shape.item(place, item, status)
        if item.kind is Kind.CALL:
            yield self._event("function_call_arguments.done", **at, arguments=item.text, name=item.name)
        else:
            yield self._event(f"{_NAMES[item.kind]}.done", **at, text=item.text, **_logprobs(item))
            part = _text_part(item.text) if item.kind is Kind.TEXT else {"type": "reasoning_text", "text": item.text}
            yield self._event("content_part.done", **at, part=part)
        yield self._event("output_item.done", output_index=place, item=whole)

    def last_events(self) -> list[str]:
        response = self._shape.finished([] if self._reader is None else self._reader.items, self._progress)
        return [self._event(response["status"], response=response)]

    def broken(self, problem: Problem) -> str:
        return self._event("failed", response=self._shape.broken(problem))


_NAMES = {Kind.REASONING: "reasoning_text", Kind.TEXT: "output_text", Kind.CALL: "function_call_arguments"}


def _logprobs(item: Item) -> dict[str, Any]:
    return {"logprobs": []} if item.kind is Kind.TEXT else {}


def _usage(progress: JobProgress) -> dict[str, Any]:
    reasoning = sum(choice.reasoning_tokens for choice in progress.choices)
    return {
        "input_tokens": progress.prompt_tokens,
        "input_tokens_details": {"cached_tokens": progress.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": progress.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": progress.prompt_tokens + progress.completion_tokens,
    }
