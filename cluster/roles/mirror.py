"""What the store has of roles, as seen last: switches, pins, orders, what routers measure. Decides nothing."""

from __future__ import annotations

from cluster.roles.records import (
    ANSWERS,
    AUDIT,
    DECISIONS,
    DEMANDS,
    LEADER,
    ORDERS,
    PINS,
    SWITCHES,
    decode,
    demand_of,
    order_of,
    switch_of,
)
from cluster.roles.switches import RoleSwitch
from cluster.store.store import ABSENT, Entry, Snapshot
from router.requests.demand import DemandReport
from router.roles import Order

LASTING = (SWITCHES, PINS)
"""What a store that has lost its memory is told again."""


class StoreMirror:
    """One process's view. Entries that are none of ours are as if they were not there."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self._entries: dict[str, Entry] = {}
        self.lost: dict[str, str] = {}
        """Values by key that a store forgot, and that nobody has written again."""
        self.switches: dict[str, RoleSwitch] = {}
        self.pinned: frozenset[str] = frozenset()
        self.demands: dict[str, DemandReport] = {}

    def take(self, snapshot: Snapshot) -> None:
        entries = {entry.key: entry for entry in snapshot.entries}
        if self.epoch is not None and snapshot.epoch != self.epoch:
            self.lost |= {key: entry.value for key, entry in self._entries.items() if key.startswith(LASTING)}
        self.lost = {key: value for key, value in self.lost.items() if key not in entries}
        self.epoch, self._entries = snapshot.epoch, entries
        self.switches = {
            key.removeprefix(SWITCHES): switch
            for key, entry in entries.items()
            if key.startswith(SWITCHES) and (switch := switch_of(entry.value)) is not None
        }
        self.pinned = frozenset(key.removeprefix(PINS) for key in entries if key.startswith(PINS))
        self.demands = {
            key.removeprefix(DEMANDS): demand
            for key, entry in entries.items()
            if key.startswith(DEMANDS) and (demand := demand_of(entry.value)) is not None
        }

    @property
    def is_seen(self) -> bool:
        return self.epoch is not None

    @property
    def leader(self) -> Entry | None:
        return self._entries.get(LEADER)

    def version(self, key: str) -> int:
        entry = self._entries.get(key)
        return entry.version if entry is not None else ABSENT

    def orders(self) -> list[tuple[Entry, str, Order]]:
        """Entry, name and order."""
        found = []
        for key in sorted(key for key in self._entries if key.startswith(ORDERS)):
            entry = self._entries[key]
            order = order_of(entry.value)
            if order is not None:
                found.append((entry, *order))
        return found

    def answer(self, name: str) -> str | None:
        """To an order; None: there is none yet."""
        entry = self._entries.get(ANSWERS + name)
        return str(decode(entry.value).get("error", "")) if entry is not None else None

    def ring(self, prefix: str) -> list[dict[str, object]]:
        """The records of a ring, oldest first."""
        records = [decode(entry.value) for key, entry in self._entries.items() if key.startswith(prefix)]
        return sorted(
            (record for record in records if isinstance(record.get("number"), int)),
            key=lambda record: int(str(record["number"])),
        )

    def audit(self) -> list[dict[str, object]]:
        return self.ring(AUDIT)

    def decisions(self) -> list[dict[str, object]]:
        return self.ring(DECISIONS)
