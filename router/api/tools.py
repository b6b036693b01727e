"""What a chat request says about tools and thinking: read, checked, and put in the form that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.api.formats.grammars import CallableTool
from workers.errors import InvalidRequest

MAX_TOOLS = 128
_MAX_BUDGET = 2**31 - 1
THINKING_FIELDS = frozenset(
    (
        "chat_template_kwargs",
        "reasoning_effort",
        "enable_thinking",
        "thinking",
        "thinking_token_budget",
        "reasoning_max_tokens",
    )
)
"""A body that has none of them says nothing about thinking."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that a model may call."""

    tools: tuple[Mapping[str, Any], ...]
    is_parallel: bool
    """More than one call in an answer is of use."""
    is_required: bool = False
    """An answer without a call is of no use."""
    only: str | None = None
    """The one that is to be called."""

    def callable(self) -> list[CallableTool]:
        """Those that may be called, each with the schema of its arguments."""
        functions = [tool["function"] for tool in self.tools]
        return [
            CallableTool(function["name"], function.get("parameters"), function.get("strict") is True)
            for function in functions
            if self.only in (None, function["name"])
        ]


def read_tools(tools: Sequence[Any] | None, choice: Any, parallel: bool | None) -> ToolUse | None:
    """None: the model is to call nothing. Raises InvalidRequest naming the tool that cannot be offered."""
    only = _read_choice(choice)
    if (only or choice == "required") and not tools:
        raise InvalidRequest("tool_choice needs tools", "tool_choice")
    if not tools:
        return None
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools takes at most {MAX_TOOLS} tools, not {len(tools)}", "tools")
    for place, tool in enumerate(tools):
        _check_tool(tool, f"tools[{place}]")
    if choice == "none":
        return None
    if only and all(tool["function"]["name"] != only for tool in tools):
        raise InvalidRequest(f"tool_choice names {only!r:.80}, which is none of the tools", "tool_choice")
    return ToolUse(tuple(tools), parallel is not False and not only, bool(only) or choice == "required", only)


def _read_choice(choice: Any) -> str | None:
    """The function that is to be called. Raises InvalidRequest."""
    match choice:
        case None | "none" | "auto" | "required":
            return None
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
        case _:
            what = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
            raise InvalidRequest(f"tool_choice must be {what}", "tool_choice")


def _check_tool(tool: Any, where: str) -> None:
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}} if _NAME.fullmatch(name):
            if not isinstance(rest.get("description", ""), str | None):
                raise InvalidRequest(f"{where}.function.description must be a string", "tools")
            if not isinstance(rest.get("parameters"), dict | None):
                raise InvalidRequest(f"{where}.function.parameters must be a JSON schema, an object", "tools")
        case {"type": str(kind)} if kind != "function":
            raise InvalidRequest(f"{where}: tools of type {kind!r:.80} are not supported, only functions", "tools")
        case _:
            what = "a function with a name of 1 to 64 letters, digits, _, - or ."
            raise InvalidRequest(
                f'{where} must be {what}: {{"type": "function", "function": {{"name": ...}}}}', "tools"
            )


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message, their arguments as an object, which templates write as they like."""
    if not isinstance(calls, list) or len(calls) > MAX_TOOLS:
        raise InvalidRequest(f"{where} must be an array of at most {MAX_TOOLS} calls", "messages")
    return [_read_call(call, f"{where}[{place}]") for place, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), **rest}} if call.get("type", "function") == "function":
            written = rest.get("arguments")
        case _:
            raise InvalidRequest(f"{where} must be a function call with a name", "messages")
    try:
        arguments = json.loads(written) if isinstance(written, str) and written.strip() else written or {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{where}.function.arguments must be a JSON object, written as a string", "messages")
    return {**call, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_thinking(
    template_kwargs: Mapping[str, Any] | None,
    reasoning_effort: str | None,
    enable_thinking: bool | None,
    thinking: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What chat templates are told about thinking, under the names they use; chat_template_kwargs win."""
    kwargs = dict(template_kwargs or {})
    if thinking is not None:
        kind = thinking.get("type")
        if kind not in ("enabled", "disabled", "adaptive") or thinking.keys() - {"type", "budget_tokens"}:
            what = '{"type": "enabled"} or {"type": "disabled"}, with budget_tokens if there is a bound'
            raise InvalidRequest(f"thinking must be {what}", "thinking")
        if kind != "adaptive" and enable_thinking is None:
            enable_thinking = kind == "enabled"
    if enable_thinking is not None:
        kwargs.setdefault("enable_thinking", enable_thinking)
    if reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", reasoning_effort)
    return kwargs


def read_budget(
    thinking: Mapping[str, Any] | None, thinking_token_budget: int | None, reasoning_max_tokens: int | None
) -> tuple[int, str] | None:
    """Tokens of reasoning at most, and the field that says so; None: no bound. Raises InvalidRequest."""
    asked = (
        ("thinking_token_budget", thinking_token_budget),
        ("reasoning_max_tokens", reasoning_max_tokens),
        ("thinking", (thinking or {}).get("budget_tokens")),
    )
    for field, value in asked:
        if value is None or value == -1:
            continue
        if type(value) is not int or not 0 <= value <= _MAX_BUDGET:
            raise InvalidRequest(f"{field} must be a number of tokens from 0 to {_MAX_BUDGET}, or -1", field)
        return value, field
    return None
