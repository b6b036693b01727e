"""Every endpoint of the API, as a table: its path, whose key opens it, what it takes and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from router.api import answer_schema as answers
from router.api.admin_schema import DrainBody, KeyBody, KeyEndBody, PinBody, RoleBody
from router.api.messages_body import CountBody, MessagesBody
from router.api.problems import REFUSALS
from router.api.responses_body import ResponsesBody
from router.api.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

JSON = "application/json"
Key = Literal["api", "admin", "metrics", "none"]
"""Whose key opens an endpoint, where keys are set (router/api/door.py)."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation. `chunk`: what an event of its stream holds; `kind` stands in place of `answer` for what is no JSON."""

    method: Literal["get", "post", "delete"]
    path: str
    summary: str
    answer: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    chunk: type[BaseModel] | None = None
    kind: str = JSON
    key: Key = "api"
    error: type[BaseModel] = answers.Error
    errors: tuple[int, ...] = ()
    """Beside those that stand at the door: 401, 403, 413, 415."""
    query: tuple[str, ...] = ()
    """What may stand behind the path, as text."""


_WORK = (400, 404, 413, 415, 422, 429, *sorted({row.status for row in REFUSALS.values()} - {400, 429}))
_READ = (400, 404, 413, 415, 429, 503)
_STEER = (400, 404, 413, 415, 429, 500, 503)
_KEYS_OF = (400, 404, 409, 413, 415, 429, 503)

ENDPOINTS = (
    Endpoint(
        "post",
        "/v1/chat/completions",
        "Answers a conversation, whole or as a stream of server-sent events",
        answers.ChatCompletion,
        ChatBody,
        answers.ChatCompletionChunk,
        errors=_WORK,
    ),
    Endpoint(
        "post",
        "/v1/completions",
        "Goes on from a text or from token ids, whole or as a stream of server-sent events",
        answers.TextCompletion,
        CompletionBody,
        answers.TextCompletion,
        errors=_WORK,
    ),
    Endpoint(
        "post",
        "/v1/messages",
        "Answers a conversation in the form of Anthropic's API, whole or as a stream of server-sent events",
        answers.Message,
        MessagesBody,
        answers.MessageEvent,
        error=answers.MessageError,
        errors=_WORK,
    ),
    Endpoint(
        "post",
        "/v1/messages/count_tokens",
        "Counts the tokens of a conversation",
        answers.MessageTokens,
        CountBody,
        error=answers.MessageError,
        errors=_READ,
    ),
    Endpoint(
        "post",
        "/v1/responses",
        "Answers a list of items, whole, as a stream of server-sent events, or in the background; the answer is kept for a while",
        answers.ResponseObject,
        ResponsesBody,
        answers.ResponseEvent,
        errors=_WORK,
    ),
    Endpoint(
        "get",
        "/v1/responses/{response_id}",
        "Shows a response, or with stream=true its events, from the one behind number starting_after on",
        answers.ResponseObject,
        chunk=answers.ResponseEvent,
        errors=_WORK,
        query=("stream", "starting_after"),
    ),
    Endpoint(
        "delete",
        "/v1/responses/{response_id}",
        "Forgets a response; one that runs in the background is stopped",
        answers.ResponseDeleted,
        errors=(400, 404, 429),
    ),
    Endpoint(
        "post",
        "/v1/responses/{response_id}/cancel",
        "Stops a response that runs in the background",
        answers.ResponseObject,
        errors=_WORK,
    ),
    Endpoint(
        "get",
        "/v1/responses/{response_id}/input_items",
        "Lists what a kept response was given",
        answers.InputItems,
        errors=_WORK,
    ),
    Endpoint(
        "get",
        "/v1/requests/{request_id}",
        "Says what has become of a request, by the id of its answer or by its Idempotency-Key",
        answers.RequestState,
        errors=(400, 404, 429),
    ),
    Endpoint(
        "get",
        "/v1/requests/{request_id}/stream",
        "The rest of a request's stream behind the event with the id `after`, whichever router it was sent to",
        chunk=answers.AnyEvent,
        errors=_WORK,
        query=("after",),
    ),
    Endpoint("get", "/v1/models", "Names the served model", answers.ModelList),
    Endpoint("get", "/v1/models/{name}", "Says what is known of a model", answers.ModelCard, errors=(404, 503)),
    Endpoint(
        "post", "/tokenize", "The tokens of a text or a conversation", answers.Tokenized, TokenizeBody, errors=_READ
    ),
    Endpoint("post", "/detokenize", "The text of tokens", answers.Detokenized, DetokenizeBody, errors=_READ),
    Endpoint("get", "/tokenizer_info", "Says what the tokenizer is", answers.TokenizerInfo, errors=(503,)),
    Endpoint("get", "/load", "Says how many requests are here", answers.ServerLoad),
    Endpoint("get", "/health", "Says that this process answers", answers.Standing, key="none"),
    Endpoint("get", "/ready", "Says whether a request could run now", answers.Standing, key="none", errors=(503,)),
    Endpoint("get", "/version", "Names this version of Baton", answers.Version, key="none"),
    Endpoint("get", "/metrics", "Metrics for Prometheus", kind="text/plain", key="metrics"),
    Endpoint("get", "/openapi.json", "This document", key="metrics"),
    Endpoint("get", "/docs", "This document as a page", kind="text/html", key="metrics"),
    Endpoint("get", "/admin/status", "What this router knows of its workers", answers.RouterAnswer, key="admin"),
    Endpoint("get", "/admin/ui", "The operator's page", kind="text/html", key="none"),
    Endpoint(
        "get",
        "/admin/requests/{request_id}",
        "Where a request, or each part of an answer, has been: in flight, or among the last that have ended",
        answers.WaysAnswer,
        key="admin",
        errors=(404,),
    ),
    Endpoint(
        "get", "/admin/roles", "Who decides on roles, what was decided, and why", answers.RolesAnswer, key="admin"
    ),
    Endpoint("get", "/admin/keys", "The keys of tenants, by their hashes", answers.KeysAnswer, key="admin"),
    Endpoint(
        "post",
        "/admin/keys",
        "Keeps the hash of a tenant's new key",
        answers.KeyAnswer,
        KeyBody,
        key="admin",
        errors=_KEYS_OF,
    ),
    Endpoint(
        "post",
        "/admin/keys/{key_id}/end",
        "Revokes a tenant's key, now or at a time that comes",
        answers.KeyAnswer,
        KeyEndBody,
        key="admin",
        errors=_KEYS_OF,
    ),
    Endpoint(
        "post",
        "/admin/workers/{worker_id}/pin",
        "Keeps a worker out of the role controller's hands, or gives it back",
        answers.PinAnswer,
        PinBody,
        key="admin",
        errors=_STEER,
    ),
    Endpoint(
        "post",
        "/admin/workers/{worker_id}/role",
        "Switches a worker's role while it serves",
        answers.WorkerAnswer,
        RoleBody,
        key="admin",
        errors=_STEER,
    ),
    Endpoint(
        "post",
        "/admin/workers/{worker_id}/drain",
        "Has a worker take no new work, or take it again",
        answers.WorkerAnswer,
        DrainBody,
        key="admin",
        errors=_STEER,
    ),
)
