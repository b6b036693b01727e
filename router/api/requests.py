"""/v1/requests: what has become of a request, and the rest of its stream, of whichever router it was sent to (docs/api.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.answer import Answer
from router.api.asking import AnswerKind, read_ticket
from router.api.callers import owner_of
from router.api.chat import CHAT
from router.api.completions import COMPLETION
from router.api.messages import MESSAGE
from router.api.naming import jobs_called
from router.api.problems import Rejected, rejected
from router.api.responses import RESPONSE
from router.api.services import Services
from router.api.sse import to_json
from router.api.tickets import Ticket
from router.job_part import FoundJob

KINDS: Mapping[str, AnswerKind] = {kind.name: kind for kind in (CHAT, COMPLETION, MESSAGE, RESPONSE)}


def request_routes(services: Services) -> APIRouter:
    routes = APIRouter()

    async def find(http: HttpRequest, request_id: str, waits: bool) -> tuple[Ticket, FoundJob]:
        """With `waits` one that waits here for a worker is waited for. Raises Rejected where it is not there, and where it is somebody else's, which sounds the same."""
        owner = owner_of(http.scope)
        for job_id in jobs_called(request_id, owner):
            found = await services.seeker.find(job_id, waits)
            ticket = Ticket.read(found.ticket)
            if ticket is not None and ticket.owner == owner and ticket.kind in KINDS:
                return ticket, found
        raise _unknown(request_id)

    @routes.get("/v1/requests/{request_id}", response_model=None)
    async def show_request(http: HttpRequest, request_id: str) -> Response:
        ticket, found = await find(http, request_id, waits=False)
        return Response(to_json(_state(request_id, ticket, found)), media_type="application/json")

    @routes.get("/v1/requests/{request_id}/stream", response_model=None)
    async def follow_request(http: HttpRequest, request_id: str) -> Response:
        after = http.query_params.get("after") or http.headers.get("last-event-id", "")
        ticket, found = await find(http, request_id, waits=True)
        if not ticket.body:
            raise rejected(
                404,
                "request_not_kept",
                "this request is too long to be kept with its answer; send it again with its Idempotency-Key and Last-Event-ID",
            )
        asked = await read_ticket(services, KINDS[ticket.kind], ticket, http.scope, is_stream=True)
        return Answer(services, asked, after, found)

    return routes


def _unknown(request_id: str) -> Rejected:
    message = f"there is no request {request_id!r:.80}, or it is kept no more"
    return rejected(404, "request_not_found", message, "request_id")


def _state(request_id: str, ticket: Ticket, found: FoundJob) -> dict[str, Any]:
    choices, prompts = list[dict[str, Any]](), dict[str, int]()
    for name, (worker_id, request) in sorted(found.requests.items(), key=lambda item: _place(item[0])):
        prompt, choice = _place(name)
        prompts[str(prompt)] = request.num_prompt_tokens
        choices.append(
            {
                "prompt": prompt,
                "choice": choice,
                "finish_reason": request.finish_reason,
                "completion_tokens": request.num_tokens,
                "cached_tokens": request.cached_tokens,
                "worker": worker_id,
                "is_whole": request.is_whole,
            }
        )
    is_over = all(choice["finish_reason"] is not None for choice in choices)
    num_completion, num_prompt = sum(choice["completion_tokens"] for choice in choices), sum(prompts.values())
    return {
        "id": request_id,
        "object": "request",
        "job": ticket.naming.job_id,
        "kind": ticket.kind,
        "created": ticket.naming.created,
        "status": "queued" if not choices else "completed" if is_over else "running",
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        },
        "choices": choices,
    }


def _place(name: str) -> tuple[int, int]:
    """Which prompt and choice of its job a request is, as router/api/translate.py names it."""
    _, prompt, choice = name.rsplit("-", 2)
    return int(prompt), int(choice)
