"""Translates values whose protobuf message has the same fields under the same names, all of them numbers or texts.

What a value works out from its fields is no field of the message.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def fields_of(value: DataclassInstance) -> dict[str, Any]:
    """What the message is made of; protobuf raises ValueError where it has no such field."""
    return {field.name: getattr(value, field.name) for field in fields(value) if field.init}


def from_fields(kind: type[T], message: Any) -> T:
    return kind(**{field.name: getattr(message, field.name) for field in fields(kind) if field.init})
