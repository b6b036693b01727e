"""What /v1/responses takes, read as a conversation of ours. Knows no answers and no store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import StrictBool, StrictInt, StrictStr

from router.api.schema import MESSAGES, Body, ChatBody, Number, read_fields, said
from workers.errors import InvalidRequest

_KEPT = ("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id", "reasoning", "store",
         "temperature", "text", "tool_choice", "tools", "top_p", "truncation", "user")  # fmt: skip


class ResponsesBody(Body):
    model: StrictStr | None = None
    input: StrictStr | Annotated[list[dict[str, Any]], MESSAGES]
    instructions: StrictStr | None = None
    stream: StrictBool | None = None
    max_output_tokens: Annotated[StrictInt, said("integer", minimum=1)] | None = None
    temperature: Annotated[Number, said("number", minimum=0, maximum=2)] | None = None
    top_p: Annotated[Number, said("number", minimum=0, maximum=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    store: StrictBool | None = None
    previous_response_id: StrictStr | None = None
    truncation: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    background: StrictBool | None = None
    user: Any = None
    prompt_cache_key: StrictStr | None = None
    top_logprobs: StrictInt | None = None
    conversation: Any = None
    prompt: Any = None
    seed: StrictInt | None = None
    top_k: StrictInt | None = None


def echoed(body: ResponsesBody) -> dict[str, Any]:
    """What a response repeats of its request."""
    defaults = {"parallel_tool_calls": True, "store": True, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
                "truncation": "disabled", "metadata": {}}  # fmt: skip
    given = {name: getattr(body, name) for name in _KEPT}
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}


def as_chat(body: ResponsesBody, before: Sequence[Mapping[str, Any]]) -> tuple[ChatBody, list[dict[str, Any]]]:
    """The same as a body of /v1/chat/completions, behind the conversation of an earlier response; and the conversation without
    instructions, which are those of one response. Raises InvalidRequest naming the field that has no meaning here."""
    for field in ("conversation", "prompt", "top_logprobs"):
        if getattr(body, field):
            raise InvalidRequest(f"{field} is not supported", field)
    if body.background and body.store is False:
        raise InvalidRequest("a response of the background is kept: leave store out", "store")
    if body.truncation not in (None, "disabled"):
        raise InvalidRequest("truncation must be disabled", "truncation")
    said_so_far = [*map(dict, before), *read_items(body.input)]
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    reasoning = body.reasoning or {}
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": [*instructions, *said_so_far],
        "stream": body.stream,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "tools": _tools(body.tools),
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body.text),
        "reasoning_effort": reasoning.get("effort"),
        "prompt_cache_key": body.prompt_cache_key,
        "user": body.user if isinstance(body.user, str) else None,
    }
    return read_fields(ChatBody, {name: value for name, value in fields.items() if value is not None}), said_so_far


def _format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    match (text or {}).get("format"):
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "json_object"}
        case {"type": "json_schema", "schema": dict(schema)}:
            return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
        case _:
            raise InvalidRequest(
                "text.format must be of the type text, json_object or json_schema with a schema", "text"
            )


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    made = []
    for place, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise InvalidRequest(
                f"tools[{place}]: tools of type {tool.get('type')!r:.80} are not supported, only functions", "tools"
            )
        function = {
            name: value
            for name, value in tool.items()
            if name in ("name", "description", "parameters") and value is not None
        }
        made.append({"type": "function", "function": function | {"strict": tool.get("strict") is True}})
    return made


def read_items(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Input items as messages; calls, and the reasoning before them, belong to one message of the assistant."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(given):
        where = f"input[{place}]"
        match item:
            case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                _assistant(messages).setdefault("tool_calls", []).append(call)
            case {"type": "function_call_output", "call_id": str(call_id)}:
                content = _text(item.get("output"), f"{where}.output")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case {"type": "reasoning"}:
                parts = item.get("content") or item.get("summary") or []
                thought = "\n".join(
                    part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)
                )
                if thought:
                    messages.append({"role": "assistant", "content": "", "reasoning_content": thought})
            case {"role": str(role)} if item.get("type", "message") == "message":
                content = _text(item.get("content"), f"{where}.content")
                if (
                    role == "assistant"
                    and messages
                    and messages[-1].get("reasoning_content")
                    and not messages[-1]["content"]
                ):
                    messages[-1]["content"] = content
                else:
                    messages.append({"role": role, "content": content})
            case _:
                raise InvalidRequest(f"{where}: items of type {item.get('type')!r:.80} are not supported", "input")
    return messages


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content if isinstance(content, list) else [content]):
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, dict) else None
                raise InvalidRequest(f"{where}[{place}]: content of type {kind!r:.80} is not supported", "input")
    return "\n".join(texts)
