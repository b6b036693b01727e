"""The ways in which models mark reasoning, answers and tool calls, by the names that FastDeploy and vLLM use for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import entry_points

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
    def tags(self) -> tuple[str, ...]:
        return (*(self.reasoning or ()), *(self.answer or ()), *(self.call or ()))


AUTO, NONE = "auto", "none"
GROUP = "baton.output_formats"
"""Entry points of installed packages under it are OutputFormats, which both settings take by the entry point's name."""
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
    """Raises InvalidConfig for a name that is not known, and for a package's format that says nothing of what it is to be used for."""
    for setting, name, known in (
        ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
        ("tool_parser", tool_parser, TOOL_PARSERS),
    ):
        if name == AUTO or name in known:
            continue
        form = _installed(name)
        if form is None:
            raise InvalidConfig(
                f"router.api.{setting} must be {AUTO} or one of {', '.join(known)}, or an installed entry point of {GROUP}, not {name!r:.80}"
            )
        if not (form.call if setting == "tool_parser" else form.reasoning or form.answer):
            raise InvalidConfig(f"router.api.{setting}: the installed format {name!r:.80} has no tags for it")


@cache
def _installed(name: str) -> OutputFormat | None:
    """Raises InvalidConfig when what a package offers under this name is no format."""
    for entry in entry_points(group=GROUP, name=name):
        try:
            form = entry.load()
        except Exception as error:
            raise InvalidConfig(f"the entry point {name!r:.80} of {GROUP} cannot be loaded: {error!r:.300}") from error
        if not isinstance(form, OutputFormat) or not all(map(_are_tags, (form.reasoning, form.answer, form.call))):
            raise InvalidConfig(
                f"the entry point {name!r:.80} of {GROUP} must be an OutputFormat, each kind of text None or an opening and a closing tag"
            )
        return form
    return None


def _are_tags(pair: object) -> bool:
    match pair:
        case None:
            return True
        case (str(opening), str(closing)):
            return bool(opening and closing)
        case _:
            return False


def _format_of(name: str, known: dict[str, OutputFormat]) -> OutputFormat:
    """Of a name that check_parsers has let pass."""
    form = known.get(name) or _installed(name)
    if form is None:
        raise InvalidConfig(f"no package offers the format {name!r:.80} any more")
    return form


@lru_cache(maxsize=16)
def output_format(reasoning_parser: str, tool_parser: str, template: str) -> OutputFormat:
    """The format of a model by its parsers' names; with `auto` by the tags that its chat template speaks of."""
    named = {part: tags for part, tags in (("reasoning", THINK), ("answer", RESPONSE)) if tags[0] in template}
    own = OutputFormat(**named) if THINK[0] in template else OutputFormat()
    reasoning = own if reasoning_parser == AUTO else _format_of(reasoning_parser, REASONING_PARSERS)
    if tool_parser == AUTO:
        return replace(reasoning, call=TOOL_CALL if TOOL_CALL[0] in template else None)
    return replace(reasoning, call=_format_of(tool_parser, TOOL_PARSERS).call)
