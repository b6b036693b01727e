"""Keeps the last responses of /v1/responses in memory, for who made them; knows no HTTP. What is dropped or was made by another router is not found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.shares import Shares

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
    """Used by one event loop. Where there are too many, the oldest go of whoever has most."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._by_id: dict[str, Stored] = {}
        self._counts: Shares[str, str] = Shares(max_responses)
        self._bytes: Shares[str, str] = Shares(max_bytes)

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_bytes(self) -> int:
        return self._bytes.total

    def put(self, stored: Stored) -> None:
        """One that is larger than all together may be is not kept."""
        if stored.num_bytes > self._max_bytes:
            return
        response_id = stored.response["id"]
        self._by_id[response_id] = stored
        self._counts.add(response_id, stored.owner)
        self._bytes.add(response_id, stored.owner, stored.num_bytes)
        for surplus in {*self._counts.take_surplus(), *self._bytes.take_surplus()}:
            self._remove(surplus)

    def get(self, response_id: str, owner: str) -> Stored | None:
        stored = self._by_id.get(response_id)
        return stored if stored is not None and stored.owner == owner else None

    def delete(self, response_id: str, owner: str) -> bool:
        if self.get(response_id, owner) is None:
            return False
        self._remove(response_id)
        return True

    def forget(self, response_id: str) -> None:
        """Whoever it belongs to has had it deleted elsewhere."""
        if response_id in self._by_id:
            self._remove(response_id)

    def _remove(self, response_id: str) -> None:
        del self._by_id[response_id]
        self._counts.remove(response_id)
        self._bytes.remove(response_id)
