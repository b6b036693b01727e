"""The allowances that routers share: buckets that fill with time, and places that owners hold for a while. Time is an argument.

A router takes from them in slices. This is what one Redis, one store of a single host, or a router that is alone keeps; their code
differs, what they do is this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FORGET_S = 120.0
"""Longer than a bucket takes to be full again (a minute) it need not be kept."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Wants `want` from a bucket that holds at most `capacity` and fills with `rate_per_s`; below 0: gives that much back."""

    name: str
    want: float
    capacity: float
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class Hold:
    """`owner` wants to hold `want` of `limit` places that all owners share, in place of what it holds, for `ttl_s`."""

    name: str
    owner: str
    want: int
    limit: int
    ttl_s: float


Ask = Draw | Hold


@dataclass(frozen=True, slots=True)
class Given:
    """What an Ask brought, at most what it wanted; and what is left for others."""

    amount: float
    left: float


def drawn(level: float, draw: Draw, passed_s: float) -> tuple[float, float]:
    """What a Draw gets, and the bucket's level then. It was at `level` when `passed_s` began."""
    level = min(draw.capacity, level + draw.rate_per_s * max(0.0, passed_s))
    if draw.want < 0:
        return draw.want, min(draw.capacity, level - draw.want)
    amount = max(0.0, min(draw.want, level))
    return amount, level - amount


@dataclass(slots=True)
class _Places:
    by_owner: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Places, and until when."""


class Buckets:
    """Kept in memory; bounded by the names that are asked for within FORGET_S."""

    def __init__(self) -> None:
        self._levels: dict[str, tuple[float, float]] = {}
        """By bucket: its level, and when it was so; those that were asked for last come last."""
        self._places: dict[str, _Places] = {}

    def __len__(self) -> int:
        return len(self._levels) + len(self._places)

    def ask(self, asks: Sequence[Ask], now: float) -> tuple[Given, ...]:
        """What each of them gets, in their order."""
        given = [self._draw(ask, now) if isinstance(ask, Draw) else self._hold(ask, now) for ask in asks]
        while self._levels and next(iter(self._levels.values()))[1] < now - FORGET_S:
            del self._levels[next(iter(self._levels))]
        return tuple(given)

    def _draw(self, draw: Draw, now: float) -> Given:
        level, at_s = self._levels.pop(draw.name, (draw.capacity, now))
        amount, level = drawn(level, draw, now - at_s)
        self._levels[draw.name] = level, now
        return Given(amount, level)

    def _hold(self, hold: Hold, now: float) -> Given:
        places = self._places.setdefault(hold.name, _Places()).by_owner
        for owner in [owner for owner, (_, until_s) in places.items() if until_s <= now or owner == hold.owner]:
            del places[owner]
        left = hold.limit - sum(count for count, _ in places.values())
        amount = max(0, min(hold.want, left))
        if amount:
            places[hold.owner] = amount, now + hold.ttl_s
        elif not places:
            del self._places[hold.name]
        return Given(amount, max(0, left - amount))
