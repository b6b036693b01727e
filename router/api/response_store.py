"""Keeps the last responses of /v1/responses in memory, for who made them; knows no HTTP. What is dropped or was made by another router is not found."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 4096
MAX_STORED_BYTES = 64 << 20
"""Of their JSON, their conversations counted each time anew."""


@dataclass(frozen=True, slots=True)
class Stored:
    owner: str
    """Whoever asks with another key does not find it."""
    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    """The conversation, the answer included."""
    num_bytes: int


class ResponseStore:
    """Used by one event loop. The oldest go first."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORED_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[str, Stored] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def put(self, stored: Stored) -> None:
        """One that is larger than all together may be is not kept."""
        if stored.num_bytes > self._max_bytes:
            return
        before = self._by_id.pop(stored.response["id"], None)
        self._by_id[stored.response["id"]] = stored
        self.num_bytes += stored.num_bytes - (0 if before is None else before.num_bytes)
        while len(self._by_id) > self._max_responses or self.num_bytes > self._max_bytes:
            _, oldest = self._by_id.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def get(self, response_id: str, owner: str) -> Stored | None:
        stored = self._by_id.get(response_id)
        return stored if stored is not None and stored.owner == owner else None

    def delete(self, response_id: str, owner: str) -> bool:
        stored = self.get(response_id, owner)
        if stored is None:
            return False
        del self._by_id[response_id]
        self.num_bytes -= stored.num_bytes
        return True
