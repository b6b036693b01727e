"""What the store has of roles, as seen last: switches, pins, orders, what routers measure. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

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
    number_of,
    order_of,
    switch_of,
)
from cluster.roles.switches import RoleSwitch
from cluster.store.store import ABSENT, Entry, Snapshot
from router.requests.demand import DemandReport
from router.roles import Order

T = TypeVar("T")

LASTING = (SWITCHES, PINS)
"""What a store that has lost its memory is told again."""


class StoreMirror:
    """One process's view. Entries that are none of ours are as if they were not there."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self._entries: dict[str, Entry] = {}
        self.lost: dict[str, str] = {}
        """Values by key that a store forgot, and that nobody has written again."""
        self.refused: frozenset[str] = frozenset()
        """Keys of entries that are no records of roles."""
        self.switches: dict[str, RoleSwitch] = {}
        self.pinned: frozenset[str] = frozenset()
        self.demands: dict[str, DemandReport] = {}
        self._orders: dict[str, tuple[str, Order]] = {}
        """By worker: its order, with the name."""

    def take(self, snapshot: Snapshot) -> frozenset[str]:
        """The keys that are refused, and were not before."""
        entries = {entry.key: entry for entry in snapshot.entries}
        if self.epoch is not None and snapshot.epoch != self.epoch:
            self.lost |= {key: entry.value for key, entry in self._entries.items() if key.startswith(LASTING)}
        self.lost = {key: value for key, value in self.lost.items() if key not in entries}
        self.epoch, self._entries = snapshot.epoch, entries
        switches = self._records(SWITCHES, switch_of)
        self.switches = {name: switch for name, switch in switches.items() if switch.worker_id == name}
        self.pinned = frozenset(key.removeprefix(PINS) for key in entries if key.startswith(PINS))
        self.demands = self._records(DEMANDS, demand_of)
        orders = self._records(ORDERS, order_of)
        self._orders = {name: order for name, order in orders.items() if order[1].worker_id == name}
        known = (
            *((SWITCHES, name) for name in self.switches),
            *((DEMANDS, name) for name in self.demands),
            *((ORDERS, name) for name in self._orders),
        )
        good = {prefix + name for prefix, name in known}
        before, self.refused = (
            self.refused,
            frozenset(key for key in entries if key.startswith((SWITCHES, DEMANDS, ORDERS)) and key not in good),
        )
        return self.refused - before

    def _records(self, prefix: str, read: Callable[[str], T | None]) -> dict[str, T]:
        """By what follows the prefix, those that can be read."""
        return {
            key.removeprefix(prefix): record
            for key, entry in self._entries.items()
            if key.startswith(prefix) and (record := read(entry.value)) is not None
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
        return [(self._entries[ORDERS + worker_id], *self._orders[worker_id]) for worker_id in sorted(self._orders)]

    def answer(self, name: str) -> str | None:
        """To an order; None: there is none yet."""
        entry = self._entries.get(ANSWERS + name)
        return str(decode(entry.value).get("error", "")) if entry is not None else None

    def ring(self, prefix: str) -> list[dict[str, object]]:
        """The records of a ring, oldest first."""
        records = [decode(entry.value) for key, entry in self._entries.items() if key.startswith(prefix)]
        return sorted(
            (record for record in records if number_of(record) is not None), key=lambda record: number_of(record) or 0
        )

    def audit(self) -> list[dict[str, object]]:
        return self.ring(AUDIT)

    def decisions(self) -> list[dict[str, object]]:
        return self.ring(DECISIONS)
