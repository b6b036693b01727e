"""What answers look like, field by field, for /openapi.json; nothing is written through these models: chat.py and its like do that.

A field with a default is left out of some answers. Objects hold no fields beside those named here, but for what operators read.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    message: str
    type: str
    param: str | None
    """The field of the body that is meant."""
    code: str


class Error(_Answer):
    error: ErrorDetail


class PromptTokensDetails(_Answer):
    cached_tokens: int


class CompletionTokensDetails(_Answer):
    reasoning_tokens: int


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class PromptLogprob(_Answer):
    logprob: float
    rank: int | None
    decoded_token: str


class _Generated(_Answer):
    """What all answers and chunks of generating endpoints hold."""

    id: str
    created: int
    model: str
    usage: Usage | None = None
    service_tier: None = None
    system_fingerprint: None = None
    baton: dict[str, Any] | None = None
    """Where and how it ran, where `trace` was asked for."""


class _Choice(_Answer):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = None
    """The stop string or token that ended it; null for the end of the text."""
    token_ids: list[int] | None = None


class _Prompted(_Answer):
    """Of a prompt, where it was asked for."""

    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class TopLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    content: list[TokenLogprob]


class FunctionCall(_Answer):
    arguments: str
    name: str | None = None


class ToolCall(_Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallDelta(_Answer):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same as reasoning_content."""
    tool_calls: list[ToolCall] | None = None


class ChatDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(_Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(_Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletion(_Generated, _Prompted):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(_Generated, _Prompted):
    """One event of a stream; the last event is `[DONE]`, and one that holds `error` ends a stream that broke."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Choice, _Prompted):
    text: str
    logprobs: TextLogprobs | None


class TextCompletion(_Generated):
    """An answer, and one event of a stream as well; the last event is `[DONE]`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class TextBlock(_Answer):
    type: Literal["text"]
    text: str


class ThinkingBlock(_Answer):
    type: Literal["thinking"]
    thinking: str
    signature: str
    """Empty: nobody checks it."""


class ToolUseBlock(_Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(_Answer):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(_Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """One event of a stream, from message_start to message_stop; `error` ends one that broke."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class MessageTokens(_Answer):
    input_tokens: int


class MessageErrorDetail(_Answer):
    type: str
    message: str
    param: str | None
    code: str


class MessageError(_Answer):
    type: Literal["error"]
    error: MessageErrorDetail


class OutputItem(BaseModel):
    """Reasoning, a message or a call of a function, each with fields of its own."""

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """An answer; further fields repeat those of the request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None


class ResponseEvent(BaseModel):
    """One event of a stream, numbered from 0; `response.completed`, `.incomplete` or `.failed` is the last."""

    type: str
    sequence_number: int


class AnyEvent(BaseModel):
    """An event of the stream that the request has: a chunk, or an event of a message or a response."""


class RequestChoice(_Answer):
    """One choice of a request. `is_whole`: its stream can be had from its beginning; otherwise it is computed anew."""

    prompt: int
    choice: int
    finish_reason: Literal["stop", "length"] | None
    completion_tokens: int
    cached_tokens: int
    worker: str
    is_whole: bool


class RequestUsage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class RequestState(_Answer):
    """What has become of a request."""

    id: str
    object: Literal["request"]
    job: str
    kind: Literal["chat", "completion", "message", "response"]
    created: int
    status: Literal["running", "completed"]
    usage: RequestUsage
    choices: list[RequestChoice]


class ResponseDeleted(_Answer):
    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]


class InputItems(_Answer):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False]


class TokenizerInfo(_Answer):
    vocab_size: int
    model_max_length: int
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: list[int]
    added_tokens: dict[str, int]


class ServerLoad(_Answer):
    server_load: int
    """Requests that run or wait here."""


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    prompt: str


class Standing(_Answer):
    status: Literal["ok", "ready"]


class Version(_Answer):
    version: str


class WorkerAnswer(BaseModel):
    """What a worker last said of itself; further fields are for people."""

    worker_id: str
    generation: str
    role: Literal["prefill", "decode", "mixed"]
    is_draining: bool
    load: dict[str, Any]
    counters: dict[str, float]


class WorkerPlace(BaseModel):
    """A worker as this router sees it."""

    status: WorkerAnswer
    connected: bool
    frame_age_s: float
    num_requests: int


class RouterAnswer(BaseModel):
    """What a router knows; further fields are for people."""

    router_id: str
    workers: list[WorkerPlace]
    num_waiting: int
    num_running: int
    counters: dict[str, float]


class WaysAnswer(BaseModel):
    """The way of a request: its steps with their times after its arrival, the worker of each, and why."""

    requests: list[dict[str, Any]]


class RolesAnswer(BaseModel):
    """Who decides on roles, and what was decided (docs/roles.md); without a role controller there is nothing in it."""

    leader: str = ""
    mode: str = ""
    workers: list[dict[str, Any]] = []
    desired_workers: int | None = None
    decisions: list[dict[str, Any]] = []
    audit: list[dict[str, Any]] = []


class PinAnswer(BaseModel):
    worker_id: str
    pinned: bool


class KeyAnswer(BaseModel):
    """A tenant's key, without the key itself. Times in seconds since 1970."""

    id: str
    tenant: str
    sha256: str
    expires_s: float | None
    revoked_s: float | None
    stored: bool


class KeysAnswer(BaseModel):
    keys: list[KeyAnswer]
