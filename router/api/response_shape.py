"""How /v1/responses writes its answers, whole and as a stream of its events; and keeps what has ended. Knows no path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from router.api.answer_items import Began, Ended, Item, ItemReader, Kind, Said, items_of
from router.api.job_progress import JobProgress
from router.api.problems import Problem
from router.api.response_store import ResponseStore, Stored
from router.api.responses_body import ResponsesBody, read_items
from router.api.sse import named_event, to_json
from router.api.translate import Job
from workers.request import FinishReason, Output


def input_items(body: ResponsesBody) -> list[dict[str, Any]]:
    """What the client has sent, as it can be listed."""
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
