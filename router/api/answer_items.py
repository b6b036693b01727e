"""One choice as a list of things said, in order: reasoning, text, calls; for APIs that show an answer as items. Writes no JSON.

An item has begun when its first piece is told, and has ended when the next begins or the answer ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from router.api.job_progress import Choice
from router.api.message import MessageReader
from router.api.translate import Job
from workers.request import Output


class Kind(StrEnum):
    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Item:
    """`name` and `call_id` are a call's, whose text is the JSON of its arguments."""

    kind: Kind
    name: str = ""
    call_id: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Began:
    item: Item


@dataclass(frozen=True, slots=True)
class Said:
    """More text of the item that began last."""

    item: Item
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    item: Item


class ItemReader:
    """Reads the outputs of one choice in their order; `items` are those that have begun."""

    def __init__(self, job: Job, choice: Choice) -> None:
        self._reader = MessageReader(job, choice)
        self.items: list[Item] = []

    def read(self, output: Output) -> Iterator[Began | Said | Ended]:
        fields = self._reader.read(output)
        for name, kind in (("reasoning_content", Kind.REASONING), ("content", Kind.TEXT)):
            if text := fields.get(name):
                yield from self._say(kind, text)
        for call in fields.get("tool_calls", ()):
            yield from self._call(call)
        if output.finish_reason is not None and self.items:
            yield Ended(self.items[-1])

    def _say(self, kind: Kind, text: str) -> Iterator[Began | Said | Ended]:
        if not self.items or self.items[-1].kind is not kind:
            yield from self._begin(Item(kind))
        yield self._add(text)

    def _call(self, call: dict[str, Any]) -> Iterator[Began | Said | Ended]:
        if "id" in call:
            yield from self._begin(Item(Kind.CALL, call["function"]["name"], call["id"]))
        if text := call["function"]["arguments"]:
            yield self._add(text)

    def _begin(self, item: Item) -> Iterator[Began | Ended]:
        if self.items:
            yield Ended(self.items[-1])
        self.items.append(item)
        yield Began(item)

    def _add(self, text: str) -> Said:
        self.items[-1].pieces.append(text)
        return Said(self.items[-1], text)


def items_of(job: Job, choice: Choice) -> list[Item]:
    """Of a finished choice whose outputs were kept."""
    reader = ItemReader(job, choice)
    for output in choice.outputs:
        for _ in reader.read(output):
            pass
    return reader.items
