"""Reads settings into frozen dataclasses with pydantic: from files, texts, the environment; knows no particular setting.

A text may stand for any value, so that a flag, a variable and a file spell it alike. What is wrong is said with the setting's
name, what it must be, and what it is - but for secrets.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ByteSize, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema

from workers.errors import InvalidConfig

T = TypeVar("T")

ENVIRONMENT_PREFIX = "BATON__"
"""BATON__WORKER__MAX_NUM_SEQS=32 is worker.max_num_seqs; further names of the environment are none of ours."""
_SECRETS = frozenset(("api_keys", "admin_keys", "keys", "url"))
"""Settings whose value no message shows; a store's URL may hold a password."""
_MUST_BE = {
    "missing": "is required",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dataclass_type": "must be a group of settings",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
}


def build(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of the dataclass `kind` from nested mappings. `path` is its place in the file, for messages.

    Raises InvalidConfig for an unknown key (naming the closest one), a missing one, a value of another type or out of bounds.
    """
    try:
        built: T = _model(kind).model_validate({"value": _read_texts(kind, values, path)}).value
        return built
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidConfig(_sentence(kind, first, path)) from error


def override(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`values` with `a.b=c` texts laid over them; what the texts mean is decided by `build`."""
    result = dict(values)
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted.strip():
            raise InvalidConfig(f"--set takes NAME=VALUE, such as worker.max_num_seqs=32; it got {dotted!r}")
        result = lay(result, dotted.strip().split("."), text)
    return result


def lay(values: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """`values` with one of them replaced; groups on the way are made."""
    name, *rest = path
    if not rest:
        return {**values, name: value}
    inner = values.get(name)
    return {**values, name: lay(inner if isinstance(inner, Mapping) else {}, rest, value)}


def from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Dotted names and texts of the settings that the environment holds."""
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): text
        for name, text in sorted(environment.items())
        if name.startswith(ENVIRONMENT_PREFIX)
    }


def json_schema(kind: type, title: str) -> dict[str, Any]:
    """The schema (draft 2020-12) of files that `build(kind, ...)` accepts. What the command line may fill in is not required.

    Stricter than `build`, which also takes texts for numbers; sizes may be texts such as "64MiB" in both.
    """
    definitions = _model(kind).model_json_schema(schema_generator=_Untitled)["$defs"]
    for definition in definitions.values():
        definition.pop("required", None)
        for name, written in definition.get("properties", {}).items():
            if name.endswith("_bytes"):
                number = {key: written.pop(key) for key in ("type", "minimum") if key in written}
                written["anyOf"] = [number, {"type": "string", "pattern": r"^-?\d+(\.\d+)? ?([kKmMgG]i?)?[bB]?$"}]
    root = definitions.pop(kind.__name__)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "title": title, "$defs": definitions}


class _Untitled(GenerateJsonSchema):
    """Without a title that repeats each setting's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _model(kind: Any) -> Any:
    """A model with one field: its configuration holds for the plain dataclasses below it, which know nothing of pydantic."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    return create_model("Settings", __config__=config, value=(kind, ...))


def _read_texts(kind: Any, value: Any, path: str) -> Any:
    """`value` with texts that stand for a group, a list, a size or nothing replaced by those; absent groups are empty ones."""
    if dataclasses.is_dataclass(kind):
        value = _structure(value, path, "a group of settings", "")
        if not isinstance(value, Mapping):
            return value
        hints = get_type_hints(kind)
        empty: dict[str, Any] = {
            field.name: {}
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and dataclasses.is_dataclass(hints[field.name])
        }
        return {
            name: _read_texts(hints.get(name), inner, _join(path, str(name)))
            for name, inner in (empty | dict(value)).items()
        }
    if isinstance(value, bool) and kind in (int, float):
        raise InvalidConfig(f"{path} must be a number; it is {value!r}")  # pydantic takes true for 1
    if not isinstance(value, str):
        return value
    if get_origin(kind) is tuple:
        return (
            _structure(value, path, "a list", _shown(path, value)) if value.lstrip().startswith("[") else _split(value)
        )
    if type(None) in get_args(kind) and value.lower() in ("none", "null"):
        return None
    return _size(value, path) if kind is int and path.endswith("_bytes") else value


def _structure(value: Any, path: str, what: str, shown: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise InvalidConfig(f"{path} must be {what}{shown}") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _size(text: str, path: str) -> Any:
    """Bytes of "64MiB", "64Mi" or "64M"; a plain number is left as it is."""
    if re.fullmatch(r"\s*-?[\d_]+\s*", text):
        return text
    try:
        unit = "B" if text.rstrip().lower().endswith("i") else ""
        return int(TypeAdapter(ByteSize).validate_python(text.strip() + unit))
    except ValidationError:
        raise InvalidConfig(f"{path} must be a number of bytes, such as 64MiB{_shown(path, text)}") from None


def _sentence(kind: type, error: Any, path: str) -> str:
    _, *groups, last = error["loc"]
    place = path
    for step in (*groups, last):
        place = f"{place}[{step}]" if isinstance(step, int) else _join(place, step)
    if error["type"] == "unexpected_keyword_argument":
        return _unknown(kind, groups, str(last), place)
    if error["type"] == "missing" and isinstance(last, int):
        return f"{place.rpartition('[')[0]} must be a list of at least {last + 1} values{_shown(place, error['input'])}"
    what = _MUST_BE.get(error["type"], f"is wrong: {error['msg']}").format(**error.get("ctx", {}))
    # Of a group as a whole nothing is shown: it may hold secrets.
    return f"{place} {what}" + ("" if error["type"] in ("missing", "dataclass_type") else _shown(place, error["input"]))


def _unknown(kind: Any, groups: list[Any], name: str, place: str) -> str:
    for group in groups:
        kind = get_type_hints(kind)[group]
    names = [field.name for field in dataclasses.fields(kind)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    group_path = place.removesuffix(name).rstrip(".")
    hint = f"did you mean {_join(group_path, close[0])}?" if close else f"known here: {', '.join(names)}"
    return f"unknown setting {place}; {hint}"


def _shown(path: str, value: Any) -> str:
    """The end of a sentence that says what was given, unless it may be a secret."""
    return "" if _SECRETS & set(re.split(r"[.\[]", path)) else f"; it is {value!r:.200}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
