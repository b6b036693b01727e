"""/v1/messages and /v1/messages/count_tokens: Anthropic's API, whole and as a stream of its events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.answer import Answer
from router.api.answer_items import Began, Ended, Item, ItemReader, Kind, Said, items_of
from router.api.asking import AnswerKind, Reading, read_asked
from router.api.job_progress import Choice, JobProgress
from router.api.messages_body import CountBody, MessagesBody, as_chat
from router.api.offload import offload
from router.api.problems import Problem, anthropic_error
from router.api.schema import parse_body
from router.api.services import Services
from router.api.shapes import Shape
from router.api.speech import read_conversation
from router.api.sse import named_event, to_json
from router.api.translate import Job, translate_chat
from workers.request import FinishReason, Output


def message_routes(services: Services) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/messages", response_model=None)
    async def create_message(http: HttpRequest) -> Response:
        return Answer(services, await read_asked(http, services, MESSAGE), http.headers.get("last-event-id", ""))

    @routes.post("/v1/messages/count_tokens", response_model=None)
    async def count_tokens(http: HttpRequest) -> Response:
        async with services.bodies.receive(http) as raw:
            model = services.backend.model

            def count() -> int:
                chat = as_chat(parse_body(CountBody, raw))
                return len(read_conversation(chat, model, services.tokenizer, services.config).prompt.token_ids)

            num_tokens = await offload(count, len(raw), services.config.offload_bytes)
        return Response(to_json({"input_tokens": num_tokens}), media_type="application/json")

    return routes


def _read(raw: bytes, reading: Reading) -> tuple[Job, Callable[[Job], Shape]]:
    chat = as_chat(parse_body(MessagesBody, raw))
    return translate_chat(chat, reading.model, reading.tokenizer, reading.config, reading.naming), MessageShape


MESSAGE = AnswerKind("message", _read)


class MessageShape:
    """A message of content blocks."""

    is_counted = True

    def __init__(self, job: Job) -> None:
        self._job = job

    def writer(self, progress: JobProgress) -> MessageEvents:
        return MessageEvents(self._job, progress)

    def whole(self, progress: JobProgress) -> dict[str, Any]:
        (choice,) = progress.choices
        blocks = [_block(item) for item in items_of(self._job, choice)]
        return _message(self._job, blocks, _stop(choice, blocks), _usage(progress))


class MessageEvents:
    """Implements StreamWriter: message_start, each block's events, message_delta, message_stop."""

    def __init__(self, job: Job, progress: JobProgress) -> None:
        self._job = job
        self._progress = progress
        self._reader: ItemReader | None = None

    def chunk(self, choice: Choice, output: Output) -> Iterable[str]:
        if self._reader is None:
            self._reader = ItemReader(self._job, choice)
            usage = _usage(self._progress) | {"output_tokens": 0}
            message = _message(self._job, [], {"stop_reason": None, "stop_sequence": None}, usage)
            yield named_event({"type": "message_start", "message": message})
        choice.is_announced = True
        for told in self._reader.read(output):
            index = len(self._reader.items) - 1
            match told:
                case Began(item=item):
                    block = _block(item) | ({"input": {}} if item.kind is Kind.CALL else {})
                    yield named_event({"type": "content_block_start", "index": index, "content_block": block})
                case Said(item=item, text=text):
                    delta = {"type": f"{_DELTAS[item.kind][0]}_delta", _DELTAS[item.kind][1]: text}
                    yield named_event({"type": "content_block_delta", "index": index, "delta": delta})
                case Ended(item=item):
                    if item.kind is Kind.REASONING:
                        signed = {"type": "signature_delta", "signature": ""}
                        yield named_event({"type": "content_block_delta", "index": index, "delta": signed})
                    yield named_event({"type": "content_block_stop", "index": index})

    def last_events(self) -> list[str]:
        (choice,) = self._progress.choices
        blocks = [] if self._reader is None else [_block(item) for item in self._reader.items]
        delta = {"type": "message_delta", "delta": _stop(choice, blocks), "usage": _usage(self._progress)}
        return [named_event(delta), named_event({"type": "message_stop"})]

    def broken(self, problem: Problem) -> str:
        return named_event(anthropic_error(problem))


_DELTAS = {
    Kind.REASONING: ("thinking", "thinking"),
    Kind.TEXT: ("text", "text"),
    Kind.CALL: ("input_json", "partial_json"),
}


def _message(job: Job, blocks: list[dict[str, Any]], stop: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    fixed = {"id": f"msg_{job.job_id}", "type": "message", "role": "assistant", "model": job.model}
    return {**fixed, "content": blocks, **stop, "usage": usage}


def _block(item: Item) -> dict[str, Any]:
    """As far as it has come."""
    match item.kind:
        case Kind.REASONING:
            return {"type": "thinking", "thinking": item.text, "signature": ""}
        case Kind.TEXT:
            return {"type": "text", "text": item.text}
        case Kind.CALL:
            return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": _arguments(item.text)}


def _arguments(text: str) -> dict[str, Any]:
    """Of a call that was cut short there is no object: an empty one."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _stop(choice: Choice, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    reason, sequence = "end_turn", None
    if choice.finish_reason is FinishReason.LENGTH:
        reason = "max_tokens"
    elif any(block["type"] == "tool_use" for block in blocks):
        reason = "tool_use"
    elif isinstance(choice.stop_reason, str):
        reason, sequence = "stop_sequence", choice.stop_reason
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(progress: JobProgress) -> dict[str, Any]:
    """Anthropic counts tokens from a cache apart."""
    cached = progress.cached_tokens
    return {
        "input_tokens": progress.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": progress.completion_tokens,
    }
