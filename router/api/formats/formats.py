"""The ways in which models mark reasoning, answers and tool calls, by the names that FastDeploy and vLLM use for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workers.errors import InvalidConfig

Tags = tuple[str, str]
THINK: Tags = ("<think>", "</think>")
RESPONSE: Tags = ("<response>", "</response>")
TOOL_CALL: Tags = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The opening and closing tag of each kind of text; None: the model marks none."""

    reasoning: Tags | None = None
    answer: Tags | None = None
    """What stands around the answer that a user is to see."""
    call: Tags | None = None

    @property
    def has_tags(self) -> bool:
        return bool(self.reasoning or self.answer or self.call)

    @property
    def tags(self) -> tuple[str, ...]:
        return (*(self.reasoning or ()), *(self.answer or ()), *(self.call or ()))


AUTO, NONE = "auto", "none"
REASONING_PARSERS = {
    NONE: OutputFormat(),
    "ernie-x1": OutputFormat(THINK, RESPONSE),
    "ernie45": OutputFormat(THINK, RESPONSE),
    "ernie-45-vl": OutputFormat(THINK),
    "ernie-45-vl-thinking": OutputFormat(THINK),
}
"""What `router.api.reasoning_parser` may be, beside `auto`."""
TOOL_PARSERS = {
    NONE: OutputFormat(),
    "ernie-x1": OutputFormat(call=TOOL_CALL),
    "ernie45": OutputFormat(call=TOOL_CALL),
    "ernie-45-vl-thinking": OutputFormat(call=TOOL_CALL),
    "hermes": OutputFormat(call=TOOL_CALL),
}
"""What `router.api.tool_parser` may be, beside `auto`."""


def check_parsers(reasoning_parser: str, tool_parser: str) -> None:
    """Raises InvalidConfig for a name that is not known."""
    for setting, name, known in (
        ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
        ("tool_parser", tool_parser, TOOL_PARSERS),
    ):
        if name != AUTO and name not in known:
            raise InvalidConfig(f"router.api.{setting} must be {AUTO} or one of {', '.join(known)}, not {name!r:.80}")


def output_format(reasoning_parser: str, tool_parser: str, template: str) -> OutputFormat:
    """The format of a model by its parsers' names; with `auto` by the tags that its chat template speaks of."""
    named = {part: tags for part, tags in (("reasoning", THINK), ("answer", RESPONSE)) if tags[0] in template}
    own = OutputFormat(**named) if THINK[0] in template else OutputFormat()
    reasoning = own if reasoning_parser == AUTO else REASONING_PARSERS[reasoning_parser]
    if tool_parser == AUTO:
        return replace(reasoning, call=TOOL_CALL if TOOL_CALL[0] in template else None)
    return replace(reasoning, call=TOOL_PARSERS[tool_parser].call)
