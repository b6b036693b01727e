"""The sandbox that chat templates run in: a checkpoint's template is a stranger's program, and gets a stranger's share.

It reaches no attribute that Jinja's sandbox hides. Beyond that each rendering may take MAX_STEPS turns of loops and calls, and
write MAX_CHARACTERS; what multiplies texts or lists looks at the size of its result first. Loops and output are counted by
filters that are put around them when a template is compiled.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor

MAX_STEPS = 400_000
MAX_CHARACTERS = 1 << 26
MAX_ELEMENTS = 1 << 20
"""Of a list."""
MAX_NUMBER = 100_000
"""Of what a filter or method is told: a width, a count."""
_MULTIPLYING = frozenset(
    (
        "replace",
        "join",
        "indent",
        "center",
        "ljust",
        "rjust",
        "zfill",
        "expandtabs",
        "batch",
        "slice",
        "sum",
        "wordwrap",
    )
)
_WIDE = re.compile(r"\d{6}|\*")
_WIDE_FIELD = re.compile(r"\d{6}|:[^}]*\{")
"""A field of str.format with a huge width, or with one that is an argument."""
_ELEMENT = 128
"""What a number or list counts for, in characters: looking at it takes as long."""
_COUNTED, _SHOWN, _JOINED = "_counted", "_shown", "_joined"


class TooCostly(jinja2.TemplateRuntimeError):
    """The template asks for more than its share."""


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles chat templates with the names and the handling of blanks that they are written for, and renders them."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag])
        self._share = threading.local()
        self.filters = {name: _guarded(name, given) for name, given in self.filters.items()}
        self.filters["tojson"] = self._to_json
        self.filters |= {_COUNTED: self._counted, _SHOWN: self._shown, _JOINED: self._joined}
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def render(self, template: jinja2.Template, names: Mapping[str, Any]) -> str:
        """The template's text. Raises TooCostly, or what else the template does; on one thread at a time each."""
        self._share.steps, self._share.characters = MAX_STEPS, MAX_CHARACTERS
        return template.render(names)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (_is_small(left) and _is_small(right) and abs(right) <= 64):
            raise TooCostly("a power is too large")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TooCostly("a format is too wide")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _bound(len(one) * max(0, other), one)
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _bound(len(left) + len(right), left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._take(steps=1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            _check_call(getattr(__obj, "__name__", ""), owner, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FIELD.search(value.__self__):
            raise TooCostly("a format is too wide")
        return wrapped

    def _take(self, steps: int = 0, characters: int = 0) -> None:
        share = self._share
        share.steps = getattr(share, "steps", MAX_STEPS) - steps
        share.characters = getattr(share, "characters", MAX_CHARACTERS) - characters
        if share.steps < 0:
            raise TooCostly(f"it takes more than {MAX_STEPS} steps")
        if share.characters < 0:
            raise TooCostly(f"it writes more than {MAX_CHARACTERS} characters")

    @jinja2.pass_context
    def _counted(self, _: Any, values: Iterable[Any], characters: int) -> Iterator[Any]:
        """Put around what a loop runs over; each turn writes so many characters that are the template's own."""
        for value in values:
            self._take(1, characters)
            yield value

    @jinja2.pass_context
    def _shown(self, _: Any, value: Any) -> Any:
        """Put around what is written."""
        self._take(1, _size(value))
        return value

    @jinja2.pass_context
    def _joined(self, _: Any, *parts: Any) -> str:
        """In place of the operator ~."""
        self._take(1, sum(map(_size, parts)))
        return "".join(map(str, parts))

    @jinja2.pass_context
    def _to_json(self, _: Any, value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        if not _is_small(options.get("indent") or 0) or (options.get("indent") or 0) > 16:
            raise TooCostly("an indent is too wide")
        self._take(1, _size(value))
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Metering(jinja2.visitor.NodeTransformer):
    """Puts the sandbox's filters around loops, output and concatenations."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        own = sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filter(_COUNTED, node.iter, jinja2.nodes.Const(own))
        return node

    def visit_Output(self, node: jinja2.nodes.Output) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, jinja2.nodes.TemplateData) else _filter(_SHOWN, part) for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        first, *rest = node.nodes
        return _filter(_JOINED, first, *rest)


def _filter(name: str, value: jinja2.nodes.Node, *arguments: jinja2.nodes.Node) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote, for training; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _guarded(name: str, given: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's filter, which looks at the size of what it is told to make first."""
    at = 1 if hasattr(given, "jinja_pass_arg") else 0

    @functools.wraps(given)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, args[at] if len(args) > at else "", (*args[at + 1 :], *kwargs.values()))
        return given(*args, **kwargs)

    return guarded


def _check_call(name: str, value: Any, arguments: tuple[Any, ...]) -> None:
    """Raises TooCostly when the method or filter could make something huge of the value."""
    if any(isinstance(each, int) and not _is_small(each) for each in arguments):
        raise TooCostly(f"{name} is asked for too much")
    if name == "format" and isinstance(value, str) and _WIDE.search(value):
        raise TooCostly("a format is too wide")
    if name in _MULTIPLYING:
        widths = (each if isinstance(each, int) else _size(each) for each in arguments)
        _bound((_size(value) + 1) * (max(widths, default=0) + 1), "")


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= MAX_NUMBER


def _bound(size: int, kind: object) -> None:
    """Raises TooCostly when a text, or a list, of this size is too large."""
    limit = MAX_CHARACTERS if isinstance(kind, str) else MAX_ELEMENTS
    if size > limit:
        raise TooCostly(f"it makes a text or list of more than {limit} elements")


def _size(value: Any) -> int:
    """About how many characters the value is written with, some for each element; stops counting beyond MAX_CHARACTERS."""
    total, waiting = 0, [value]
    while waiting and total <= MAX_CHARACTERS:
        current = waiting.pop()
        total += len(current) if isinstance(current, str | bytes) else _ELEMENT
        if isinstance(current, Mapping):
            waiting.extend(current.keys())
            waiting.extend(current.values())
        elif isinstance(current, list | tuple | set | frozenset):
            waiting.extend(current)
    return total
