"""Turns plain mappings and `key=value` texts into frozen dataclasses; knows no particular setting, refuses unknown ones."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from workers.errors import InvalidConfig

T = TypeVar("T")

_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def build(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of the dataclass `kind` from nested mappings. `path` is its place in the file, for messages.

    Raises InvalidConfig for an unknown key (naming the closest one), a missing one or a value of another type.
    """
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise InvalidConfig(_unknown(path, str(name), fields))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values and not dataclasses.is_dataclass(hints[name]):
            raise InvalidConfig(f"{_join(path, name)} is required")
        if required and name not in values:
            values = {**values, name: {}}
    return kind(**{name: convert(hints[name], value, _join(path, name)) for name, value in values.items()})


def convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`; text is parsed, so a flag and a file may spell a value alike."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in arguments:
                return None
            raise _wrong(path, "a value", value)
        return convert(next(option for option in arguments if option is not type(None)), value, path)
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin is Literal:
        return _choose({str(option): option for option in arguments}, value, path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choose({str(option.value): option for option in kind}, value, path)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, _structure(value, Mapping, "a group of settings", path), path)
    return _convert_scalar(kind, value, path)


def override(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`values` with `a.b=c` texts laid over them; what the texts mean is decided by `build`."""
    result: dict[str, Any] = {**values}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted.strip():
            raise InvalidConfig(f"--set takes NAME=VALUE, such as worker.max_num_seqs=32; it got {assignment!r}")
        *groups, name = dotted.strip().split(".")
        target = result
        for group in groups:
            inner = target.get(group)
            target[group] = {**inner} if isinstance(inner, Mapping) else {}
            target = target[group]
        target[name] = text
    return result


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = [part.strip() for part in value.split(",") if part.strip()]
    items = _structure(value, (list, tuple), "a list", path)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(convert(arguments[0], item, f"{path}[{at}]") for at, item in enumerate(items))
    if len(items) != len(arguments):
        raise _wrong(path, f"a list of {len(arguments)} values", value)
    return tuple(
        convert(kind, item, f"{path}[{at}]") for at, (kind, item) in enumerate(zip(arguments, items, strict=True))
    )


def _structure(value: Any, kind: Any, what: str, path: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise _wrong(path, what, value) from None
    if not isinstance(value, kind):
        raise _wrong(path, what, value)
    return value


def _choose(options: Mapping[str, Any], value: Any, path: str) -> Any:
    text = str(value.value if isinstance(value, Enum) else value)
    if text not in options:
        raise _wrong(path, f"one of {', '.join(options)}", value)
    return options[text]


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is bool:
        truth = _TRUTH.get(str(value).lower()) if isinstance(value, (bool, str)) else None
        if truth is not None:
            return truth
        raise _wrong(path, "true or false", value)
    if kind is int:
        number = _integer(value, in_bytes=path.endswith("_bytes"))
        if number is not None:
            return number
        raise _wrong(path, "a whole number", value)
    if kind is float:
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
        raise _wrong(path, "a number", value)
    if kind is str:
        raise _wrong(path, "text", value)
    raise TypeError(f"no way to read {path} as {kind}")


def _integer(value: Any, in_bytes: bool) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        return None
    match = re.fullmatch(r"(-?[\d_]+)\s*([kmg]i?)?b?", value.strip().lower())
    if match is None or (match[2] and not in_bytes):
        return None
    try:
        return int(match[1]) * _BYTE_UNITS[match[2] or ""]
    except ValueError:
        return None


def _unknown(path: str, name: str, names: Iterable[str]) -> str:
    names = tuple(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {_join(path, close[0])}?" if close else f"known here: {', '.join(names)}"
    return f"unknown setting {_join(path, name)}; {hint}"


def _wrong(path: str, what: str, value: Any) -> InvalidConfig:
    return InvalidConfig(f"{path} must be {what}; it is {value!r}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
