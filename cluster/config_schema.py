"""Writes the JSON Schema of a configuration from its dataclasses, with the documentation of each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SCALARS = {str: "string", bool: "boolean", int: "integer", float: "number"}


def json_schema(kind: type, title: str) -> dict[str, Any]:
    """The schema (draft 2020-12) of files that `cluster.config_reader.build(kind, ...)` accepts.

    Stricter than the reader, which also takes texts such as "64MiB" for numbers.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **_object(kind)}


def _object(kind: type) -> dict[str, Any]:
    hints, notes = get_type_hints(kind), _field_notes(kind)
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(kind):
        schema = _schema(hints[field.name])
        if field.name in notes:
            schema["description"] = notes[field.name]
        if field.default is not dataclasses.MISSING:
            schema["default"] = _plain(field.default)
        elif field.default_factory is dataclasses.MISSING and not dataclasses.is_dataclass(hints[field.name]):
            required.append(field.name)
        properties[field.name] = schema
    result: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].strip()
    if summary:
        result["description"] = " ".join(summary.split())
    if required:
        result["required"] = required
    return result


def _schema(kind: Any) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(option) for option in arguments]}
    if kind is type(None):
        return {"type": "null"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is tuple:
        prefix = [_schema(argument) for argument in arguments]
        return {"type": "array", "prefixItems": prefix, "minItems": len(prefix), "maxItems": len(prefix)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"type": "string", "enum": [option.value for option in kind]}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _object(kind)
    return {"type": _SCALARS[kind]}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _field_notes(kind: type) -> dict[str, str]:
    """The string under each field of the class body."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    notes: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            notes[statement.target.id] = " ".join(str(following.value.value).split())
    return notes
