"""What a request says about the form of its answer, in the spellings of OpenAI, vLLM, FastDeploy and SGLang, as one rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.api.formats import grammars
from router.api.formats.grammars import Rule
from router.api.schema import GenerationBody
from workers.errors import InvalidRequest
from workers.grammar.language import MISSING, engine_name
from workers.request import MAX_GRAMMAR_CHARACTERS

_MAX_CHOICES = 1024
_GUIDED = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "regex": "regex",
    "ebnf": "grammar",
    "json_schema": "json",
}
"""Fields of a body, each with the name of what it says in `structured_outputs`."""
FORM_FIELDS = frozenset((*_GUIDED, "structured_outputs", "guided_decoding", "response_format"))
"""Of a body that has none of them `read_structure` finds nothing."""
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties", "disable_fallback")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The form of an answer. `param` is the field that says it; `schema` the JSON schema in it, if there is one."""

    rule: Rule
    param: str
    schema: Any = None


def read_structure(body: GenerationBody, control: Mapping[str, int]) -> Wanted | None:
    """None: the answer may be anything. Raises InvalidRequest naming the field that says something else than it may."""
    asked: list[tuple[str, str, Any, Mapping[str, Any]]] = []
    for field, kind in _GUIDED.items():
        value = getattr(body, field)
        if value is not None and value is not False:
            options = {"whitespace_pattern": body.guided_whitespace_pattern} if field.startswith("guided_") else {}
            asked.append((field, kind, value, options))
    for field in ("structured_outputs", "guided_decoding"):
        if (kinds := getattr(body, field)) is not None:
            asked += _of_kinds(kinds, field)
    if (form := body.response_format) is not None:
        asked += _of_format(form)
    if not asked:
        return None
    if len(asked) > 1:
        fields = " and ".join(field for field, _, _, _ in asked)
        raise InvalidRequest(f"{fields} both say what the answer is: send one of them", asked[1][0].split(".")[0])
    if not engine_name():
        raise InvalidRequest(MISSING, asked[0][0].split(".")[0])
    return _read(*asked[0], control)


def _of_kinds(kinds: Mapping[str, Any], field: str) -> list[tuple[str, str, Any, Mapping[str, Any]]]:
    known = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
    for name in kinds:
        if name not in known and name not in _OPTIONS and not name.startswith("_"):
            raise InvalidRequest(f"{field} takes {', '.join(known)}, not {name!r:.80}", field)
    options = {name: kinds[name] for name in _OPTIONS if kinds.get(name)}
    given = [name for name in known if kinds.get(name) not in (None, False)]
    return [(f"{field}.{name}", name, kinds[name], options) for name in given]


def _of_format(form: Mapping[str, Any]) -> list[tuple[str, str, Any, Mapping[str, Any]]]:
    match form:
        case {"type": "text"}:
            return []
        case {"type": "json_object"}:
            return [("response_format", "json_object", True, {})]
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}} | {
            "type": "json_schema",
            "schema": dict(schema),
        }:
            return [("response_format", "json", schema, {})]
        case {"type": "json_schema", "json_schema": {**rest}} if not rest.get("schema"):
            return [("response_format", "json_object", True, {})]
        case {"type": "structural_tag"}:
            return [("response_format", "structural_tag", form, {})]
        case {"type": "regex", "pattern": str(pattern)}:
            return [("response_format", "regex", pattern, {})]
        case {"type": "grammar", "grammar": str(text)}:
            return [("response_format", "grammar", text, {})]
        case _:
            what = 'text, json_object or json_schema, as {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
            raise InvalidRequest(f"response_format must be of the type {what}", "response_format")


def _read(field: str, kind: str, value: Any, options: Mapping[str, Any], control: Mapping[str, int]) -> Wanted:
    param = field.split(".")[0]
    match kind, value:
        case "json_object", _:
            return Wanted(_json({"type": "object"}, options, param), param)
        case "json", _:
            schema = _schema(value, field, param)
            if options.get("disable_additional_properties"):
                schema = grammars.without_additions(schema)
            return Wanted(_json(schema, options, param), param, schema)
        case "regex", str(pattern):
            return Wanted(_bounded(grammars.regex_rule(_bounded_text(pattern, field, param)), param), param)
        case "choice", [*texts] if texts and all(isinstance(text, str) for text in texts):
            if len(texts) > _MAX_CHOICES:
                raise InvalidRequest(f"{field} takes at most {_MAX_CHOICES} choices", param)
            return Wanted(_bounded(grammars.choice_rule(texts), param), param)
        case "grammar", str(text):
            try:
                return Wanted(grammars.lark_rule(_bounded_text(text, field, param)), param)
            except ValueError as error:
                raise InvalidRequest(f"{field} is no grammar: {error}", param) from error
        case "structural_tag", _:
            return Wanted(_bounded(_tags(_schema(value, field, param), field, param, control), param), param)
        case _:
            wanted = {"regex": "a regular expression, a string", "choice": "an array of strings, not empty"}
            raise InvalidRequest(f"{field} must be {wanted.get(kind, 'a grammar, a string')}", param)


def _json(schema: Any, options: Mapping[str, Any], param: str) -> Rule:
    whitespace = options.get("whitespace_pattern")
    if whitespace is not None and not isinstance(whitespace, str):
        raise InvalidRequest("whitespace_pattern must be a regular expression, a string", param)
    is_compact = bool(options.get("disable_any_whitespace"))
    try:
        rule = grammars.json_rule(schema, whitespace=whitespace, is_compact=is_compact)
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(f"{param} has a schema that is nested too deeply", param) from error
    return _bounded(rule, param)


def _schema(value: Any, field: str, param: str) -> Any:
    """An object, or the JSON of one."""
    if isinstance(value, str):
        try:
            value = json.loads(_bounded_text(value, field, param))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{field} is not JSON: {error}", param) from error
    if not isinstance(value, Mapping) and not isinstance(value, bool):
        raise InvalidRequest(f"{field} must be an object, or the JSON of one", param)
    return value


def _tags(tags: Any, field: str, param: str, control: Mapping[str, int]) -> Rule:
    """vLLM's and FastDeploy's {structures: [{begin, schema, end}], triggers: [...]}: free text in which a trigger opens one of the structures."""
    match tags:
        case {"structures": [*structures], "triggers": [*triggers]} if structures and triggers:
            pass
        case _:
            raise InvalidRequest(f"{field} must have structures and triggers, arrays that are not empty", param)
    if len(structures) > _MAX_CHOICES or not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise InvalidRequest(f"{field}.triggers must be strings, and at most {_MAX_CHOICES} structures", param)
    by_trigger: dict[str, list[Rule]] = {}
    for place, structure in enumerate(structures):
        match structure:
            case {"begin": str(begin), "end": str(end)} if (
                begin and (schema := structure.get("schema", {})) is not None
            ):
                trigger = max((t for t in triggers if begin.startswith(t)), key=len, default=None)
            case _:
                raise InvalidRequest(f"{field}.structures[{place}] must have begin, schema and end", param)
        if trigger is None:
            raise InvalidRequest(f"{field}.structures[{place}].begin starts with none of the triggers", param)
        rest = begin.removeprefix(trigger)
        parts = [grammars.literal(rest, control)] if rest else []
        parts.append(_json(_schema(schema, f"{field}.structures[{place}].schema", param), {}, param))
        parts += [grammars.literal(end, control)] if end else []
        by_trigger.setdefault(trigger, []).append(parts[0].then(*parts[1:]))
    opened = [
        grammars.text_until(trigger, f"tag{place}", control).then(grammars.one_of(bodies))
        for place, (trigger, bodies) in enumerate(by_trigger.items())
    ]
    return grammars.maybe(grammars.one_of(opened), "*").then(grammars.TEXT)


def _bounded_text(text: str, field: str, param: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequest(f"{field} takes at most {MAX_GRAMMAR_CHARACTERS} characters", param)
    return text


def _bounded(rule: Rule, param: str) -> Rule:
    if len(rule.expression) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequest(f"{param} takes at most {MAX_GRAMMAR_CHARACTERS} characters, a schema's included", param)
    return rule


def subschemas(schema: Any, where: str = "$") -> Sequence[tuple[str, Any]]:
    """The schemas that stand directly in one, by their place."""
    if not isinstance(schema, Mapping):
        return []
    found: list[tuple[str, Any]] = []
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(inner := schema.get(key), Mapping):
            found += [(f"{where}.{key}.{name}", value) for name, value in inner.items()]
    for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        if isinstance(several := schema.get(key), list):
            found += [(f"{where}.{key}[{place}]", value) for place, value in enumerate(several)]
    found += [
        (f"{where}.{key}", schema[key])
        for key in ("items", "additionalProperties")
        if isinstance(schema.get(key), Mapping)
    ]
    return found
