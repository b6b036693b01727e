"""Says whether several tenants ask at the moment, so that what waits at workers, where nobody can be overtaken, is to be little. Knows no worker."""

from __future__ import annotations

from collections import OrderedDict

ASKS_S = 10.0
"""A tenant that has sent a request within this time is taken to send more."""


class Sharers:
    """Those without a name are one."""

    def __init__(self) -> None:
        self._asked_s: OrderedDict[str, float] = OrderedDict()
        """By tenant, who has asked last is last; bounded by the tenants that ask within ASKS_S."""

    def note(self, tenant: str, now: float) -> None:
        """It has sent a request."""
        self._asked_s[tenant] = now
        self._asked_s.move_to_end(tenant)

    def are_several(self, now: float) -> bool:
        while self._asked_s and next(iter(self._asked_s.values())) <= now - ASKS_S:
            self._asked_s.popitem(last=False)
        return len(self._asked_s) > 1
