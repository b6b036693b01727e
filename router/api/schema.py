"""The JSON bodies that clients send, field by field, and the fields that Baton refuses rather than ignores.

Fields that change nothing about the tokens (user, metadata, store, ...) and unknown ones are accepted and dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, WithJsonSchema

from workers.errors import InvalidRequest
from workers.limits import MAX_ALTERNATIVES, MAX_ENTRIES
from workers.request import INT64_MAX, INT64_MIN

Number = StrictInt | StrictFloat
MESSAGES = Field(max_length=8192)
"""Of a conversation: every one of them is read and rendered in Python."""
MAX_TEMPLATE = 64 << 10
"""Characters of a chat template that a client sends: it is compiled in Python."""
MAX_VALUES = 512 << 10
"""Of one body, counted by its commas before it is read: the reader lets nothing else run meanwhile."""
_MAX_WORK = 3 << 20
"""What reading one body may take, about 0.1 s: a value counts 1, a quotation mark 4, a bracket 10 and a name 20. What a text of 131,072 tokens holds of
their signs stays below."""
_COUNT_BYTES = 1 << 20
SHORT = Field(max_length=MAX_ENTRIES)
"""A longer list is refused before its entries are read, whatever worker.limits says; that is looked at when they have been."""


def said(kind: str, **bounds: Any) -> WithJsonSchema:
    """What /openapi.json says of a value that is looked at later than here: in prompts.py, tools.py, translate.py and workers/request.py."""
    return WithJsonSchema({"type": kind, **bounds})


def _part(field: str, *kinds: str) -> dict[str, Any]:
    properties = {"type": {"enum": list(kinds)}, field: {"type": "string"}}
    return {"type": "object", "required": ["type", field], "properties": properties}


_TOKEN = {"type": "integer", "minimum": 0}
_NAMED = {"type": "string", "minLength": 1}
_Messages = Annotated[
    list[dict[str, Any]],
    MESSAGES,
    said(
        "array",
        minItems=1,
        maxItems=8192,
        items={
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                "content": {
                    "anyOf": [
                        {"type": ["string", "null"]},
                        {
                            "type": "array",
                            "items": {
                                "anyOf": [
                                    {"type": "string"},
                                    _part("text", "text", "input_text", "output_text"),
                                    _part("refusal", "refusal"),
                                    _part("thinking", "thinking"),
                                ]
                            },
                        },
                    ]
                },
            },
        },
    ),
]
_Tools = Annotated[
    list[Any],
    said(
        "array",
        maxItems=128,
        items={
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                        "description": {"type": ["string", "null"]},
                        "parameters": {"type": ["object", "null"]},
                    },
                },
            },
        },
    ),
]
_Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "items": _TOKEN},
                {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": _TOKEN}},
            ]
        }
    ),
]
_FORM = said(
    "object",
    required=["type"],
    properties={"type": {"enum": ["text", "json_object", "json_schema", "structural_tag", "regex", "grammar"]}},
)
_Budget = Annotated[StrictInt, said("integer", minimum=-1)]
_TopLogprobs = Annotated[StrictInt, said("integer", minimum=-1, maximum=MAX_ALTERNATIVES)]
_Target = Annotated[Number, said("number", exclusiveMinimum=0, maximum=3600)]
_Penalty = Annotated[Number, said("number", minimum=-2, maximum=2)]
_Limit = Annotated[StrictInt, said("integer", minimum=0)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Body):
    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class GenerationBody(Body):
    """What both generating endpoints share. None means: left open."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, said("integer", minimum=1)] | None = None
    best_of: Annotated[StrictInt, said("integer", minimum=1)] | None = None
    use_beam_search: StrictBool | None = None
    beam_width: Annotated[StrictInt, said("integer", minimum=1)] | None = None
    length_penalty: Annotated[Number, said("number", minimum=-10, maximum=10)] | None = None
    early_stopping: StrictBool | Literal["never"] | None = None
    max_tokens: _Limit | None = None
    max_completion_tokens: _Limit | None = None
    min_tokens: _Limit | None = None
    temperature: Annotated[Number, said("number", minimum=0, maximum=2)] | None = None
    top_p: Annotated[Number, said("number", minimum=0, maximum=1)] | None = None
    top_k: Annotated[StrictInt, said("integer", minimum=-1)] | None = None
    min_p: Annotated[Number, said("number", minimum=0, maximum=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[Number, said("number", exclusiveMinimum=0, maximum=100)] | None = None
    seed: Annotated[StrictInt, said("integer", minimum=INT64_MIN, maximum=INT64_MAX)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Number],
            SHORT,
            said(
                "object",
                maxProperties=MAX_ENTRIES,
                propertyNames={"pattern": "^[0-9]{1,10}$"},
                additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
            ),
        ]
        | None
    ) = None
    bad_words: (
        Annotated[
            list[StrictStr | list[StrictInt]],
            SHORT,
            said(
                "array",
                maxItems=MAX_ENTRIES,
                items={"anyOf": [{**_NAMED, "pattern": r"\S"}, {"type": "array", "minItems": 1, "items": _TOKEN}]},
            ),
        ]
        | None
    ) = None
    stop: (
        Annotated[list[StrictStr], SHORT, said("array", maxItems=MAX_ENTRIES, items=_NAMED)]
        | Annotated[StrictStr, said("string", minLength=1)]
        | None
    ) = None
    stop_token_ids: Annotated[list[StrictInt], SHORT, said("array", maxItems=MAX_ENTRIES, items=_TOKEN)] | None = None
    clamp_max_tokens: StrictBool | None = None
    truncate_prompt_tokens: Annotated[StrictInt, said("integer", minimum=-1)] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    prompt_logprobs: _TopLogprobs | None = None
    priority: Annotated[StrictInt, said("integer", minimum=-(2**31) + 1, maximum=2**31 - 1)] | None = None
    add_special_tokens: StrictBool | None = None
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None
    trace: StrictBool | None = None
    ttft: _Target | None = None
    tpot: _Target | None = None
    timeout: _Target | None = None
    cache_salt: Annotated[StrictStr, said("string", minLength=1, maxLength=1024)] | None = None
    session_id: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    user: Any = None
    allowed_token_ids: Annotated[list[StrictInt], SHORT, said("array", maxItems=MAX_ENTRIES, items=_TOKEN)] | None = (
        None
    )
    logprob_token_ids: (
        Annotated[list[StrictInt], SHORT, said("array", maxItems=MAX_ALTERNATIVES, items=_TOKEN)] | None
    ) = None
    response_format: Annotated[dict[str, Any], _FORM] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_decoding: dict[str, Any] | None = None
    guided_json: Any = None
    guided_json_object: StrictBool | None = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: StrictStr | None = None
    structural_tag: Any = None
    regex: Any = None
    ebnf: Any = None
    json_schema: Any = None


class ChatBody(GenerationBody):
    messages: _Messages = []
    prompt_token_ids: Annotated[list[StrictInt], said("array", minItems=1, items=_TOKEN)] | None = None
    chat_template: Annotated[StrictStr, Field(max_length=MAX_TEMPLATE)] | None = None
    web_search: (
        Annotated[
            dict[str, Any],
            said(
                "object",
                required=["references", "date"],
                properties={
                    "references": {"anyOf": [_NAMED, {"type": "array", "minItems": 1, "maxItems": 256}]},
                    "date": _NAMED,
                    "language": {"enum": ["zh", "en", None]},
                },
                additionalProperties=False,
            ),
        ]
        | None
    ) = None
    logprobs: StrictBool | None = None
    top_logprobs: _TopLogprobs | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    echo: StrictBool | None = None
    documents: Annotated[list[dict[str, Any]], SHORT] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: StrictStr | None = None
    enable_thinking: StrictBool | None = None
    thinking: (
        Annotated[
            dict[str, Any],
            said(
                "object",
                required=["type"],
                properties={
                    "type": {"enum": ["enabled", "disabled", "adaptive"]},
                    "budget_tokens": {"type": ["integer", "null"], "minimum": 0},
                },
                additionalProperties=False,
            ),
        ]
        | None
    ) = None
    include_reasoning: StrictBool | None = None
    thinking_token_budget: _Budget | None = None
    reasoning_max_tokens: _Budget | None = None
    tools: _Tools | None = None
    tool_choice: Annotated[
        Any,
        WithJsonSchema(
            {
                "anyOf": [
                    {"enum": ["none", "auto", "required", None]},
                    {
                        "type": "object",
                        "required": ["type", "function"],
                        "properties": {
                            "type": {"const": "function"},
                            "function": {
                                "type": "object",
                                "required": ["name"],
                                "properties": {"name": {"type": "string"}},
                            },
                        },
                    },
                ]
            }
        ),
    ] = None
    parallel_tool_calls: StrictBool | None = None


class CompletionBody(GenerationBody):
    prompt: _Prompt
    logprobs: _TopLogprobs | None = None
    echo: StrictBool | None = None


class TokenizeBody(Body):
    """Either `prompt` or `messages`."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: _Messages | None = None
    tools: _Tools | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: StrictBool | None = None


class DetokenizeBody(Body):
    model: StrictStr | None = None
    tokens: Annotated[list[Any], said("array", items=_TOKEN)]
    skip_special_tokens: StrictBool | None = None


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words_ids": (),
    "cache_salt": (),
    "chat_template": (),
    "enable_thinking": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "kv_transfer_params": (),
    "custom_logit_processor": (),
    "lora_path": (),
    "max_new_tokens": (),
    "return_hidden_states": (),
    "stop_regex": (),
    "vllm_xargs": (),
    "logits_processors": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_token_ids": (),
    "suffix": (),
    "thinking": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "web_search": (),
    "web_search_options": (),
}
"""Fields that would change the answer in a way Baton does not offer yet, and the values that ask for nothing."""

_WHY = {
    "suffix": ": ERNIE 4.5 has no tokens for filling in",
    "max_new_tokens": ": it is max_tokens here",
}

AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse_body(kind: type[AnyBody], body: bytes) -> AnyBody:
    """One body, read and checked. Raises InvalidRequest naming the first field that is wrong or not supported."""
    num_values = _count(body, b",")
    if num_values > MAX_VALUES:
        raise InvalidRequest(f"the request body has more than {MAX_VALUES} values, or commas: send less at once")
    num_brackets = _count(body, b"{") + _count(body, b"[")
    num_quotes = _count(body, b'"')
    if num_values + 4 * num_quotes + 10 * num_brackets + 20 * _count(body, b":") > _MAX_WORK:
        raise InvalidRequest(
            "the request body has too many texts, names, lists and objects, or quotation marks, colons and brackets: send less at once"
        )
    try:
        content = pydantic_core.from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest("the request body must be a JSON object")
    for name in _HARMLESS.keys() & content.keys() - kind.model_fields.keys():
        value = content[name]
        if value not in (None, False, [], {}, "") and value not in _HARMLESS[name]:
            raise InvalidRequest(f"{name} is not supported{_WHY.get(name, '')}", name)
    return read_fields(kind, content)


def _count(body: bytes, sign: bytes) -> int:
    return sum(body.count(sign, start, start + _COUNT_BYTES) for start in range(0, len(body), _COUNT_BYTES))


def read_fields(kind: type[AnyBody], content: dict[str, Any]) -> AnyBody:
    """The same from fields that were no JSON, as those of the offline LLM."""
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        first = problems[0]
        path = [str(step) for step in first["loc"]]
        known = path[0] if path else None
        kinds = {problem["type"] for problem in problems if problem["loc"][:-1] == first["loc"][:-1]}
        told = "Input should be a valid number" if {"int_type", "float_type"} <= kinds else first["msg"]
        raise InvalidRequest(f"{known or 'body'}: {told}", known) from error
