"""The requests of one worker, by the engine's sequence ids and by the names their routers gave them. Knows no stream, no engine and no batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from workers.client import Migration
from workers.request import Request
from workers.status import WorkerAddress


@dataclass(slots=True, eq=False)
class ServedRequest:
    """One request that was accepted and has not ended."""

    sequence_id: int
    request: Request
    candidates: tuple[WorkerAddress, ...]
    """Who is to compute its prompt, best first; none: this worker."""
    migration: Migration | None
    """Where it ran before, when it is taken over from there."""
    due_s: float
    """When its first token is due; infinity when nobody said."""
    owner: int
    """The session that hears of it."""

    @property
    def name(self) -> str:
        """What its owner calls it."""
        return self.request.request_id


class RequestTable:
    """A name belongs to its owner: two routers may use the same one."""

    def __init__(self) -> None:
        self._by_sequence: dict[int, ServedRequest] = {}
        self._owned: dict[int, dict[str, ServedRequest]] = {}

    def __len__(self) -> int:
        return len(self._by_sequence)

    def __iter__(self) -> Iterator[ServedRequest]:
        return iter(list(self._by_sequence.values()))

    def add(self, served: ServedRequest) -> None:
        self._by_sequence[served.sequence_id] = served
        self._owned.setdefault(served.owner, {})[served.name] = served

    def get(self, sequence_id: int) -> ServedRequest | None:
        """None: it was cancelled, or is no request of a router."""
        return self._by_sequence.get(sequence_id)

    def of(self, owner: int, name: str) -> ServedRequest | None:
        """The request that a session calls so."""
        return self._owned.get(owner, {}).get(name)

    def owned_by(self, owner: int) -> list[ServedRequest]:
        return list(self._owned.get(owner, {}).values())

    def named(self, name: str) -> ServedRequest | None:
        """The request of that name, whichever router it belongs to; None if it is not exactly one."""
        found = [served for served in self._by_sequence.values() if served.name == name]
        return found[0] if len(found) == 1 else None

    def remove(self, served: ServedRequest) -> None:
        """It has ended, or nobody wants it any more."""
        del self._by_sequence[served.sequence_id]
        owned = self._owned[served.owner]
        del owned[served.name]
        if not owned:
            del self._owned[served.owner]
