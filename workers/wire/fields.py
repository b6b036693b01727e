"""Translates values whose protobuf message has the same fields under the same names, all of them numbers or texts.

What a value works out from its fields is no field of the message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@cache
def _plan(kind: type) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """Names of a class's fields, and what reads them off a value or a message; worked out once, since this is asked with every message."""
    names = tuple(field.name for field in fields(kind) if field.init)
    if len(names) < 2:
        return names, lambda value: tuple(getattr(value, name) for name in names)
    return names, attrgetter(*names)


def fields_of(value: DataclassInstance) -> dict[str, Any]:
    """What the message is made of; protobuf raises ValueError where it has no such field."""
    names, read = _plan(type(value))
    return dict(zip(names, read(value), strict=True))


def from_fields(kind: type[T], message: Any) -> T:
    return kind(*_plan(kind)[1](message))
