"""/v1/responses: OpenAI's newer API, whole and as a stream of its events; the last answers are kept, and can be gone on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.answer import Answer, Services, read_job
from router.api.answer_items import Began, Ended, Item, ItemReader, Kind, Said, items_of
from router.api.callers import caller_of
from router.api.job_run import JobProgress
from router.api.problems import Problem, rejected
from router.api.response_store import ResponseStore, Stored
from router.api.responses_body import ResponsesBody, as_chat, echoed, read_items
from router.api.sse import named_event, to_json
from router.api.translate import Job, translate_chat
from router.config import ApiConfig
from workers.errors import InvalidRequest
from workers.request import FinishReason, Output
from workers.status import ModelInfo
from workers.text.tokenizer import Tokenizer


def response_routes(services: Services) -> APIRouter:
    routes = APIRouter()
    store = ResponseStore()

    @routes.post("/v1/responses", response_model=None)
    async def create_response(http: HttpRequest) -> Response:
        owner, asked = _owner(http), _Asked()

        def translate(body: ResponsesBody, model: ModelInfo | None, tokenizer: Tokenizer, config: ApiConfig) -> Job:
            before: list[dict[str, Any]] = []
            if body.previous_response_id is not None:
                before = _find(store, body.previous_response_id, owner, "previous_response_id").messages
            chat, asked.messages = as_chat(body, before)
            asked.echoed = echoed(body)
            asked.input_items = _input_items(body)
            return translate_chat(chat, model, tokenizer, config)

        job = await read_job(http, services, ResponsesBody, translate)
        return Answer(services, job, ResponseShape(job, asked, store, owner))

    @routes.get("/v1/responses/{response_id}", response_model=None)
    async def show_response(http: HttpRequest, response_id: str) -> Response:
        return _json(_find(store, response_id, _owner(http)).response)

    @routes.delete("/v1/responses/{response_id}", response_model=None)
    async def delete_response(http: HttpRequest, response_id: str) -> Response:
        _find(store, response_id, _owner(http))
        store.delete(response_id, _owner(http))
        return _json({"id": response_id, "object": "response.deleted", "deleted": True})

    @routes.post("/v1/responses/{response_id}/cancel", response_model=None)
    async def cancel_response(http: HttpRequest, response_id: str) -> Response:
        _find(store, response_id, _owner(http))
        raise InvalidRequest(
            "only responses that run in the background can be cancelled, and there are none", "response_id"
        )

    @routes.get("/v1/responses/{response_id}/input_items", response_model=None)
    async def list_input_items(http: HttpRequest, response_id: str) -> Response:
        items = _find(store, response_id, _owner(http)).input_items
        ends = (
            {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
        )
        return _json({"object": "list", "data": items, **ends, "has_more": False})

    return routes


def _json(value: dict[str, Any]) -> Response:
    return Response(to_json(value), media_type="application/json")


def _owner(http: HttpRequest) -> bytes:
    return caller_of(http.scope).owner


def _find(store: ResponseStore, response_id: str, owner: bytes, param: str = "response_id") -> Stored:
    stored = store.get(response_id, owner)
    if stored is None:
        raise rejected(
            404, "response_not_found", f"there is no response {response_id!r:.80} here, or not any more", param
        )
    return stored


def _input_items(body: ResponsesBody) -> list[dict[str, Any]]:
    items = [{"type": "message", "role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    return [{"id": f"item_{place}", "type": "message", **item} for place, item in enumerate(items)]


@dataclass(slots=True)
class _Asked:
    """What is kept of a request; filled in when its body is read."""

    messages: list[dict[str, Any]] | None = None
    echoed: Mapping[str, Any] | None = None
    input_items: list[dict[str, Any]] | None = None


class ResponseShape:
    """A response with its list of output items."""

    def __init__(self, job: Job, asked: _Asked, store: ResponseStore, owner: bytes) -> None:
        self._job = job
        self._asked = asked
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
        if response["store"]:
            said = read_items(output)
            messages = [*(self._asked.messages or ()), *said]
            num_bytes = len(to_json(response)) + len(to_json(messages))
            self._store.put(Stored(self._owner, response, self._asked.input_items or [], messages, num_bytes))
        return response

    def response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        job = self._job
        fixed = {
            "id": f"resp_{job.job_id}",
            "object": "response",
            "created_at": job.created,
            "status": status,
            "model": job.model,
        }
        rest = {"output": output, "error": None, "incomplete_details": None, "usage": None, "background": False}
        return {**fixed, **rest, **(self._asked.echoed or {})}

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

    def last_chunk(self) -> str:
        response = self._shape.finished([] if self._reader is None else self._reader.items, self._progress)
        return self._event(response["status"], response=response)

    def broken(self, problem: Problem) -> str:
        response = self._shape.response("failed", [])
        response["error"] = {"code": problem.code, "message": problem.message}
        return self._event("failed", response=response)


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
