"""Maps every failure to what a client sees: HTTP status, error type and code, whether to retry, and the metric label."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from starlette.exceptions import HTTPException

from workers.errors import BatonError, InvalidRequest, Refusal, Refused


@dataclass(frozen=True, slots=True)
class Row:
    """How one kind of failure is told. `retry` goes out as x-should-retry, which openai clients obey."""

    status: int
    type: str
    retry: bool
    retry_after_s: float | None = None


REFUSALS: dict[Refusal, Row] = {
    Refusal.INVALID: Row(400, "invalid_request_error", False),
    Refusal.QUEUE_FULL: Row(429, "rate_limit_error", True, 1.0),
    Refusal.RATE_LIMITED: Row(429, "rate_limit_error", True, 1.0),
    Refusal.TARGET_MISSED: Row(429, "rate_limit_error", True, 1.0),
    Refusal.NO_WORKERS: Row(503, "service_unavailable_error", True, 1.0),
    Refusal.DEADLINE_EXCEEDED: Row(504, "timeout_error", False),
    Refusal.WORKER_LOST: Row(503, "service_unavailable_error", True),
    Refusal.WORKERS_DIED: Row(500, "server_error", False),
    Refusal.WRONG_ROLE: Row(503, "service_unavailable_error", True),
    Refusal.STALE_GENERATION: Row(503, "service_unavailable_error", True),
    Refusal.DRAINING: Row(503, "service_unavailable_error", True, 1.0),
    Refusal.NOT_MOVABLE: Row(503, "service_unavailable_error", True),
    Refusal.NOT_KEPT: Row(503, "service_unavailable_error", True),
    Refusal.TAKEN_UP: Row(409, "conflict_error", False),
    Refusal.CANCELLED: Row(409, "conflict_error", False),
    Refusal.SHUTTING_DOWN: Row(503, "service_unavailable_error", True, 1.0),
    Refusal.INTERNAL: Row(500, "server_error", False),
}
"""A request that met an internal error, or lost its workers, may be the one that causes it: it is not to be sent again."""


SENTENCES: dict[Refusal, str] = {
    Refusal.WORKERS_DIED: "workers were lost one after the other while they ran the request; it is not run again",
    Refusal.WORKER_LOST: "the workers that ran the request were lost; send it again",
    Refusal.WRONG_ROLE: "no worker could take the request; send it again",
    Refusal.STALE_GENERATION: "no worker could take the request; send it again",
    Refusal.DRAINING: "no worker could take the request; send it again later",
    Refusal.NOT_MOVABLE: "no worker could take the request; send it again",
    Refusal.NOT_KEPT: "no worker could take the request; send it again",
    Refusal.TAKEN_UP: "the request is answered elsewhere",
    Refusal.CANCELLED: "the request was cancelled",
    Refusal.SHUTTING_DOWN: "the service is stopping; send the request again later",
    Refusal.INTERNAL: "an internal error ended the request",
}
"""What clients are told of a request that was given up after it was accepted. What workers said of it names hosts, workers and the
inside of models: it goes to the log."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One failure, ready to be sent. `label` is the `refusal` label of baton_requests_total."""

    row: Row
    message: str
    code: str
    param: str | None = None
    label: str = Refusal.INVALID.value

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.row.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def response(self, path: str = "") -> Response:
        """In the form that clients of this path read."""
        headers = {"x-should-retry": "true" if self.row.retry else "false"}
        if self.row.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.row.retry_after_s)))
        if self.row.status == 401:
            headers["www-authenticate"] = "Bearer"
        body = self.body()
        if path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/"):
            body = json.dumps(anthropic_error(self), ensure_ascii=False).encode()
        return Response(body, self.row.status, headers, media_type="application/json")


ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(problem: Problem) -> dict[str, Any]:
    """A problem as Anthropic's API tells it; `param` and `code` are ours."""
    default = "invalid_request_error" if problem.row.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(problem.row.status, default)
    told = {"type": kind, "message": problem.message, "param": problem.param, "code": problem.code}
    return {"type": "error", "error": told}


class Rejected(BatonError):
    """A failure that the API itself has found and described."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def rejected(status: int, code: str, message: str, param: str | None = None) -> Rejected:
    """A caller's fault other than plain 400 `invalid_value`."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return Rejected(Problem(Row(status, kind, False), message, code, param))


def describe(error: BaseException) -> Problem:
    """The problem that stands for any exception; what is not ours to explain becomes INTERNAL without its text."""
    match error:
        case Rejected():
            return error.problem
        case InvalidRequest():
            return Problem(REFUSALS[Refusal.INVALID], str(error), "invalid_value", error.param)
        case Refused():
            row = REFUSALS[error.refusal]
            if error.retry_after_s is not None:
                row = Row(row.status, row.type, row.retry, error.retry_after_s)
            return Problem(row, str(error) or error.refusal.value, error.refusal.value, None, error.refusal.value)
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
            row = Row(error.status_code, "invalid_request_error", False)
            return Problem(row, str(error.detail), code)
        case _:
            row = REFUSALS[Refusal.INTERNAL]
            return Problem(row, "internal error", Refusal.INTERNAL.value, None, Refusal.INTERNAL.value)


async def answer_problem(http: HttpRequest, error: Exception) -> Response:
    """FastAPI's exception handler for everything that is raised on purpose."""
    problem = describe(error)
    if isinstance(error, HTTPException) and error.status_code == 404:
        problem = replace(
            problem, message=f"there is no {http.scope['path']:.200} here: GET /openapi.json names what there is"
        )
    note_refusal(http.scope, problem)
    response = problem.response(http.scope["path"])
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)  # Allow, of a 405
    return response


def note_refusal(scope: Any, problem: Problem) -> None:
    """Remembers the label for the request counter."""
    scope.setdefault("state", {})["refusal"] = problem.label
