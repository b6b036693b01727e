"""What /v1/messages takes, Anthropic's fields, read as a conversation of ours. Knows no answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import StrictBool, StrictInt, StrictStr

from router.api.schema import MESSAGES, SHORT, Body, ChatBody, Number, read_fields, said
from workers.errors import InvalidRequest

_TEXT_OR_BLOCKS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object", "required": ["type"]}}]}


class CountBody(Body):
    """A conversation whose tokens are counted."""

    model: StrictStr | None = None
    messages: Annotated[
        list[dict[str, Any]],
        MESSAGES,
        said(
            "array",
            minItems=1,
            maxItems=8192,
            items={
                "type": "object",
                "required": ["role", "content"],
                "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _TEXT_OR_BLOCKS},
            },
        ),
    ]
    system: StrictStr | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesBody(CountBody):
    max_tokens: Annotated[StrictInt, said("integer", minimum=1)]
    stop_sequences: Annotated[list[StrictStr], SHORT] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    stream: StrictBool | None = None
    metadata: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


def as_chat(body: CountBody) -> ChatBody:
    """The same as a body of /v1/chat/completions. Raises InvalidRequest naming the field that has no meaning here."""
    fields: dict[str, Any] = {"model": body.model, "messages": _conversation(body), "tools": _tools(body.tools)}
    fields |= _choice(body.tool_choice)
    if body.thinking is not None:
        fields["thinking"] = {
            name: body.thinking.get(name) for name in ("type", "budget_tokens") if body.thinking.get(name) is not None
        }
    if isinstance(body, MessagesBody):
        fields |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stream": body.stream,
            "response_format": _format(body),
        }
        user = (body.metadata or {}).get("user_id")
        fields["user"] = user if isinstance(user, str) else None
    return read_fields(ChatBody, {name: value for name, value in fields.items() if value is not None})


def _format(body: MessagesBody) -> dict[str, Any] | None:
    given = body.output_format or (body.output_config or {}).get("format")
    match given:
        case None:
            return None
        case {"type": "json_schema", "schema": dict(schema)}:
            return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
        case _:
            raise InvalidRequest('output_format must be {"type": "json_schema", "schema": {...}}', "output_format")


def _choice(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if choice is None:
        return fields
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    match choice:
        case {"type": "auto" | "none" as kind}:
            return fields | {"tool_choice": kind}
        case {"type": "any"}:
            return fields | {"tool_choice": "required"}
        case {"type": "tool", "name": str(name)}:
            return fields | {"tool_choice": {"type": "function", "function": {"name": name}}}
        case _:
            raise InvalidRequest("tool_choice must be of the type auto, any, none or tool with a name", "tool_choice")


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    made = []
    for place, tool in enumerate(tools):
        match tool:
            case {"name": str(name), "input_schema": dict(schema)} if tool.get("type", "custom") == "custom":
                function = {"name": name, "parameters": schema, "strict": tool.get("strict") is True}
                if isinstance(tool.get("description"), str):
                    function["description"] = tool["description"]
                made.append({"type": "function", "function": function})
            case _:
                raise InvalidRequest(
                    f"tools[{place}] must have a name and an input_schema; others are not offered", "tools"
                )
    return made


def _conversation(body: CountBody) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if body.system:
        made.append({"role": "system", "content": _text(body.system, "system")})
    for place, message in enumerate(body.messages):
        where, role, content = f"messages[{place}]", message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise InvalidRequest(f"{where}.role must be user, assistant or system", "messages")
        if isinstance(content, str):
            made.append({"role": role, "content": content})
        elif isinstance(content, list):
            made += _said_by_assistant(content, where) if role == "assistant" else _said_by_user(content, where, role)
        else:
            raise InvalidRequest(f"{where}.content must be a string or an array of blocks", "messages")
    return made


def _said_by_user(blocks: list[Any], where: str, role: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, in their order; text between them as well."""
    made: list[dict[str, Any]] = []
    for place, block in enumerate(blocks):
        match block:
            case {"type": "tool_result", "tool_use_id": str(call_id)}:
                content = _text(block.get("content") or "", f"{where}.content[{place}].content")
                made.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case {"type": "text", "text": str(text)}:
                if made and made[-1]["role"] == role:
                    made[-1]["content"] += "\n" + text
                else:
                    made.append({"role": role, "content": text})
            case _:
                raise _strange(block, f"{where}.content[{place}]")
    return made


def _said_by_assistant(blocks: list[Any], where: str) -> list[dict[str, Any]]:
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(blocks):
        match block:
            case {"type": "text", "text": str(said_text)}:
                text.append(said_text)
            case {"type": "thinking", "thinking": str(thought)}:
                reasoning.append(thought)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(given)}:
                function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
                calls.append({"id": call_id, "type": "function", "function": function})
            case _:
                raise _strange(block, f"{where}.content[{place}]")
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(text)}
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for place, block in enumerate(content if isinstance(content, list) else [content]):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise _strange(block, f"{where}[{place}]")
    return "\n".join(texts)


def _strange(block: Any, where: str) -> InvalidRequest:
    kind = block.get("type") if isinstance(block, Mapping) else None
    return InvalidRequest(f"{where}: content of type {kind!r:.80} is not supported", "messages")
