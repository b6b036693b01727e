"""Which kind of party may call which method of a worker: one table. Knows no gRPC."""

from __future__ import annotations

from collections.abc import Iterable

from workers.trust.parties import Kind, Party

_WORKER = "/baton.workers.Worker"

CALLERS: dict[str, frozenset[Kind]] = {
    f"{_WORKER}/Attach": frozenset({Kind.ROUTER}),
    f"{_WORKER}/Handoff": frozenset({Kind.WORKER}),
    f"{_WORKER}/SetRole": frozenset({Kind.ADMIN}),
    f"{_WORKER}/SetDraining": frozenset({Kind.ADMIN}),
    f"{_WORKER}/Describe": frozenset({Kind.ROUTER, Kind.WORKER, Kind.OBSERVER, Kind.ADMIN}),
    "/baton.KvStream/Receive": frozenset({Kind.WORKER}),
}
"""A method that is not here may be called by nobody."""


def may_call(method: str, parties: Iterable[Party]) -> bool:
    """Whether one of the parties of a certificate may call `method`, such as /baton.workers.Worker/Attach."""
    allowed = CALLERS.get(method, frozenset())
    return any(party.kind in allowed for party in parties)
