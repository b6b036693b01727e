"""Writes grammars in the language of workers.grammar: what an answer is, and what stands around it in a model's format; knows no HTTP.

A Rule is part of one; several become one grammar with `whole`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.api.formats.formats import OutputFormat, Tags

_WHITESPACE = r" |\n[ \t]{0,16}"
"""Between the parts of a JSON text. Without a bound a model may write nothing else to its last token."""
_TERMINALS = "TEXT: /(.|\\n)*/\nBREAKS: /\\n{1,4}/\n"
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Rule:
    """An expression, and the rules and grammars that it names."""

    expression: str
    rules: tuple[str, ...] = ()
    grammars: tuple[tuple[str, str], ...] = ()

    def then(self, *others: Rule) -> Rule:
        return _joined(" ", (self, *others))


def _joined(between: str, rules: Sequence[Rule]) -> Rule:
    return Rule(
        between.join(rule.expression for rule in rules),
        tuple(dict.fromkeys(text for rule in rules for text in rule.rules)),
        tuple(dict.fromkeys(named for rule in rules for named in rule.grammars)),
    )


def one_of(rules: Sequence[Rule]) -> Rule:
    joined = _joined(" | ", rules)
    return Rule(f"({joined.expression})", joined.rules, joined.grammars)


def maybe(rule: Rule, sign: str = "?") -> Rule:
    """`sign`: ? for once or not at all, * for any number, + for at least once."""
    return Rule(f"({rule.expression}){sign}", rule.rules, rule.grammars)


def whole(rule: Rule) -> str:
    """The grammar of outputs that are what the rule says."""
    top = "\n".join((f"start: {rule.expression}", *rule.rules, _TERMINALS))
    if not rule.grammars:
        return top
    named = [{"name": "answer_around", "lark_grammar": top}]
    named += [{"name": name, "lark_grammar": text} for name, text in rule.grammars]
    return json.dumps({"grammars": named}, ensure_ascii=False)


# ---- what an answer may be ----

BREAKS = Rule("BREAKS?")
TEXT = Rule("TEXT")


def json_rule(
    schema: Any, *, whitespace: str | None = None, is_compact: bool = False, is_lenient: bool = False
) -> Rule:
    """JSON as a schema wants it, an object or true. `is_lenient`: keywords that cannot be followed are passed over."""
    options: dict[str, Any] = {"whitespace_flexible": False} if is_compact else {}
    if not is_compact:
        options["whitespace_pattern"] = whitespace or _WHITESPACE
    if is_lenient:
        options["lenient"] = True
    own = {"allOf": [schema]} if not isinstance(schema, Mapping) else dict(schema)
    return Rule(f"%json {json.dumps({**own, 'x-guidance': options}, ensure_ascii=False)}")


def regex_rule(pattern: str) -> Rule:
    import llguidance

    return Rule(f"/{llguidance.regex_to_lark(pattern, '')}/")


def choice_rule(texts: Sequence[str]) -> Rule:
    return one_of([literal(text) for text in texts])


def lark_rule(text: str, name: str = "given") -> Rule:
    """A whole grammar of its own, in Lark's language or as EBNF with a rule `root`. Raises ValueError when it is neither."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return Rule(f"@{name}", (), ((name, any_to_lark(text)),))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # the converter raises bare classes of its own
        raise ValueError(str(error)) from error


def literal(text: str, control: Mapping[str, int] | None = None) -> Rule:
    """Exactly this text. What stands in `control`, texts and their tokens, is written as those tokens."""
    pieces = [text]
    if control:
        names = sorted((name for name in control if name in text), key=len, reverse=True)
        if names:
            pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    written = [
        f"<[{control[piece]}]>" if control and piece in control else json.dumps(piece, ensure_ascii=False)
        for piece in pieces
        if piece or len(pieces) == 1
    ]
    return Rule(" ".join(written))


def text_until(end: str, name: str, control: Mapping[str, int]) -> Rule:
    """Any text, and the first `end` behind it. `name` tells rules of one grammar apart."""
    if end in control:
        return TEXT.then(literal(end, control))
    return Rule(f"{name}_until", (f"{name}_until[lazy]: TEXT {json.dumps(end, ensure_ascii=False)}",))


def without_additions(schema: Any, depth: int = 0) -> Any:
    """The schema, its objects closed to properties that it does not name."""
    if depth > _MAX_DEPTH:
        return schema
    if isinstance(schema, list):
        return [without_additions(item, depth + 1) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {name: without_additions(value, depth + 1) for name, value in schema.items()}
    if isinstance(closed.get("properties"), Mapping) and closed.get("type", "object") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


# ---- calls of tools ----


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A function that may be called, and the schema of its arguments; None: it takes none."""

    name: str
    parameters: Any
    is_strict: bool


def call_rule(tools: Sequence[CallableTool], tags: Tags, control: Mapping[str, int]) -> Rule:
    """One call of one of the tools: {"name": ..., "arguments": ...} between the tags."""
    bodies = []
    for tool in tools:
        name = re.sub(r"([/.^$*+?()\[\]{}|\\-])", r"\\\1", tool.name)
        head = Rule(rf'/\{{[ \n]?"name": ?"{name}", ?"arguments": ?/')
        closed = {"type": "object", "properties": {}, "additionalProperties": False}
        schema = closed if tool.parameters is None else tool.parameters
        bodies.append(head.then(json_rule(schema, is_lenient=not tool.is_strict), Rule(r"/[ \n]?\}/")))
    return literal(tags[0], control).then(BREAKS, one_of(bodies), BREAKS, literal(tags[1], control))


def calls_rule(call: Rule, is_parallel: bool) -> Rule:
    return call.then(maybe(BREAKS.then(call), "*"), BREAKS) if is_parallel else call.then(BREAKS)


def text_with_calls(call: Rule, form: OutputFormat, is_parallel: bool, control: Mapping[str, int]) -> Rule:
    """Any text, in which calls may stand that are calls of the tools offered."""
    assert form.call is not None
    around = [literal(tag, control) for tag in form.answer or () if tag in control]
    text = maybe(one_of(around).then(TEXT), "*") if around else Rule("")
    start = TEXT.then(text)
    if form.call[0] not in control:
        opened = text_until(form.call[0], "call", control)
        head = literal(form.call[0], control).expression
        call = Rule(call.expression.removeprefix(head).lstrip(), call.rules, call.grammars)
        one = opened.then(call)
    else:
        one = start.then(call)
    return maybe(one, "*" if is_parallel else "?").then(start)


# ---- what stands around an answer ----


def around_answer(rule: Rule, form: OutputFormat, control: Mapping[str, int]) -> Rule:
    """The answer, between the format's tags or bare."""
    if form.answer is None:
        return rule
    opening, closing = (literal(tag, control) for tag in form.answer)
    return one_of([opening.then(BREAKS, rule, BREAKS, closing, BREAKS), rule])


def behind_reasoning(rule: Rule, form: OutputFormat, is_open: bool, control: Mapping[str, int]) -> Rule:
    """The rule holds from where reasoning has ended. `is_open`: the output begins inside one."""
    if form.reasoning is None:
        return rule
    thought = text_until(form.reasoning[1], "thought", control).then(BREAKS)
    return thought.then(rule) if is_open else maybe(literal(form.reasoning[0], control).then(thought)).then(rule)
