"""Which router's controller acts: a lease in the store. Decides when to take it, renew it and let it go; knows no roles."""

from __future__ import annotations

from cluster.roles.events import Remove, Renew, Renewed, Write, Wrote
from cluster.roles.records import LEADER
from cluster.store.store import ABSENT, Entry

SAFE_SHARE = 0.75
"""Of a lease: a leader that has not renewed for so long does not act any more, before another one may begin."""
RETRY_S = 1.0


class Leadership:
    """Of one candidate. `now` is any clock in seconds that does not go back."""

    def __init__(self, name: str, ttl_s: float) -> None:
        self.name = name
        self._ttl_s = ttl_s
        self._version: int | None = None
        self._kept_s = 0.0
        """When the write or renewal was sent that holds the lease."""
        self._asked_s: float | None = None
        """When an answer was last asked for that has not come."""
        self._next_s = 0.0
        self.holder = ""
        """As the store said last."""

    def leads(self, now: float) -> bool:
        return self._version is not None and now < self._kept_s + SAFE_SHARE * self._ttl_s

    def seen(self, entry: Entry | None) -> None:
        """The lease as the store has it."""
        self.holder = entry.value if entry is not None else ""
        if self._version is not None and (entry is None or entry.version > self._version):
            self._version = None

    def tick(self, now: float) -> list[Write | Renew]:
        """What is due."""
        if self._asked_s is not None and now < self._asked_s + self._ttl_s:
            return []
        self._asked_s = None
        if self._version is not None:
            if now < self._kept_s + self._ttl_s / 3 or now < self._next_s:
                return []
            self._asked_s = now
            return [Renew(LEADER, self._version, self._ttl_s)]
        if self.holder or now < self._next_s:
            return []
        self._asked_s = now
        return [Write(LEADER, ABSENT, self.name, self._ttl_s)]

    def wrote(self, answer: Wrote, now: float) -> None:
        """The lease was asked for."""
        asked_s, self._asked_s = self._asked_s, None
        if answer.version is None or asked_s is None:
            self._next_s = now + RETRY_S
            return
        self._version, self._kept_s, self.holder = answer.version, asked_s, self.name

    def renewed(self, answer: Renewed, now: float) -> None:
        self._asked_s = None
        if answer.is_kept:
            self._kept_s = max(self._kept_s, answer.sent_s)
        elif answer.failed:
            self._next_s = now + RETRY_S
        else:
            self._version, self.holder = None, ""

    def resign(self) -> list[Remove]:
        """For good."""
        self._next_s = float("inf")
        version, self._version = self._version, None
        return [Remove(LEADER, version)] if version is not None else []
