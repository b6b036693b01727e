"""One router's part of the tenants' allowances: what it has taken of them and not used yet, and when to take more. `now` is an argument.

Requests are paid for from what is here, so most cost no round trip; `asks` says what to fetch, or to give back, in one call for all
tenants. What was taken is gone from the common buckets, so routers together never admit more than these fill with; what one does not
use for IDLE_S it gives back. Knows no store, no HTTP and no request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from router.tenants.buckets import Ask, Draw, Given, Hold
from router.tenants.config import TenantLimits

IDLE_S = 2.0
FORGET_S = 10.0
"""What is known of a tenant's allowances is forgotten when it has not asked for so long and holds nothing."""
HOLD_S = 5.0
"""Places of a router that is gone are free again after this long."""
RELEASE_S = 1.0
"""Places are kept for the next request for so long."""
KEEP_S = 4.0
"""And for one that waits for other allowances: the call that runs and its own may both take tenancy.ASK_TIMEOUT_S."""
_NEARLY = 1e-6
"""Amounts are sums of parts of a minute's allowance."""
MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
"""An empty bucket is asked again after a time between these, whoever wants of it."""


class Kind(StrEnum):
    """What is rationed."""

    REQUESTS = "requests"
    INPUT = "input-tokens"
    OUTPUT = "output-tokens"
    CONCURRENT = "concurrent-requests"


BUCKETS = (Kind.REQUESTS, Kind.INPUT, Kind.OUTPUT)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a request cannot be admitted. `wait_s` None: its tenant's allowance is less than it wants, at any time."""

    kind: Kind
    limit: int
    wanted: float
    wait_s: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """For the x-ratelimit headers. `reset_s`: until all of the allowance is there again."""

    kind: Kind
    limit: int
    remaining: int
    reset_s: float


@dataclass(slots=True)
class _Bucket:
    """What is here of one allowance."""

    limit: int
    here: float = 0.0
    """Below 0: answers were longer than expected; that is taken before anything else."""
    level: float = 0.0
    """Of the common bucket, when it was last heard of:"""
    heard_s: float = 0.0
    wanted: float = 0.0
    """By requests that wait for the next call."""
    asked: float = 0.0
    """Of that, what the call that runs carries."""
    pause_until_s: float = 0.0
    spent_s: float = 0.0
    """When something was last taken from here."""
    pace_per_s: float = 0.0
    """How fast that went lately."""

    @property
    def rate_per_s(self) -> float:
        return self.limit / 60

    def remaining(self, now: float) -> float:
        """Here and, as far as is known, in common."""
        level = min(self.limit, self.level + self.rate_per_s * (now - self.heard_s))
        return max(0.0, self.here + level)

    def spend(self, amount: float, now: float) -> None:
        self.here -= amount
        passed_s = max(0.0, now - self.spent_s)
        self.pace_per_s = self.pace_per_s * math.exp(-passed_s) + amount
        self.spent_s = now


@dataclass(slots=True)
class _Places:
    """Of max_concurrent."""

    limit: int
    held: int = 0
    used: int = 0
    wanted: int = 0
    asked: int = 0
    """Of those wanted, what the call that runs carries."""
    pause_until_s: float = 0.0
    held_until_s: float = 0.0
    most: int = 0
    """That were used at once of late, until:"""
    most_until_s: float = 0.0


@dataclass(slots=True)
class _Tenant:
    buckets: dict[Kind, _Bucket] = field(default_factory=dict)
    places: _Places | None = None
    seen_s: float = 0.0


class Rations:
    """Of the router called `owner`."""

    def __init__(self, owner: str, slice_s: float, slice_share: float) -> None:
        self._owner = owner
        self._slice_s = slice_s
        self._slice_share = slice_share
        self._tenants: dict[str, _Tenant] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    # ---- requests ----

    def admit(
        self, tenant: str, limits: TenantLimits, costs: Mapping[Kind, float], now: float, is_last: bool = False
    ) -> Shortage | None:
        """Pays for a request; None: it is paid for. A Shortage with `wait_s` 0 may be over after the next call for `asks`, which then
        asks for this request too; with `is_last` it is told how long it would have to wait."""
        state = self._state(tenant, limits, now)
        for kind, bucket in state.buckets.items():
            if costs[kind] > bucket.limit:
                return Shortage(kind, bucket.limit, costs[kind], None)
        short = [kind for kind, bucket in state.buckets.items() if bucket.here < costs[kind]]
        places = state.places
        lacks_place = places is not None and places.used >= places.held
        if not short and not lacks_place:
            for kind, bucket in state.buckets.items():
                bucket.spend(costs[kind], now)
            if places is not None:
                places.used += 1
            return None
        waits_s = {kind: self._wait_s(state.buckets[kind], costs[kind], now, is_last) for kind in short}
        if places is not None and lacks_place:
            waits_s[Kind.CONCURRENT] = max(0.0, places.pause_until_s - now) or (MAX_PAUSE_S if is_last else 0.0)
        kind = max(waits_s, key=lambda name: waits_s[name])
        if not waits_s[kind]:
            for name in short:
                state.buckets[name].wanted += costs[name]
            if places is not None and lacks_place:
                places.wanted += 1
            elif places is not None:  # the place that is free for it is not given back meanwhile
                places.most, places.most_until_s = max(places.most, places.held), now + KEEP_S
        limit = places.limit if kind is Kind.CONCURRENT and places is not None else state.buckets[kind].limit
        return Shortage(kind, limit, costs.get(kind, 1), waits_s[kind])

    def end(
        self, tenant: str, limits: TenantLimits, extra: Mapping[Kind, float], now: float, num_places: int = 1
    ) -> None:
        """A request that was admitted has ended; `extra` is what it used beyond what it has paid for, below 0: less. Its `limits` are
        of the time when it began, and count only where nothing newer is known. `num_places` of those in use are free then; below 0:
        it has given its place away before, and takes it back."""
        state = self._tenants.get(tenant) or self._state(tenant, limits, now)
        state.seen_s = now
        for kind, amount in extra.items():
            if kind in state.buckets:
                state.buckets[kind].here -= amount
        if state.places is not None:
            state.places.used = max(0, state.places.used - num_places)

    def readings(self, tenant: str, limits: TenantLimits, now: float) -> list[Reading]:
        """Of each allowance that has a limit."""
        found = []
        for kind, bucket in self._state(tenant, limits, now).buckets.items():
            remaining = min(float(bucket.limit), bucket.remaining(now))
            found.append(Reading(kind, bucket.limit, int(remaining), (bucket.limit - remaining) / bucket.rate_per_s))
        return found

    @staticmethod
    def _wait_s(bucket: _Bucket, cost: float, now: float, is_last: bool) -> float:
        """How long a request that costs so much has to wait; 0: until the next call."""
        if not is_last and (now >= bucket.pause_until_s or bucket.remaining(now) >= cost):
            return 0.0
        return max(MIN_PAUSE_S, (cost - bucket.remaining(now)) / bucket.rate_per_s)

    # ---- the common buckets ----

    def asks(self, now: float) -> list[Ask]:
        """What is to be fetched or given back now; `given` must follow, or `failed`."""
        asks: list[Ask] = []
        for name, state in list(self._tenants.items()):
            for kind, bucket in state.buckets.items():
                want = self._want(bucket, now)
                bucket.asked = bucket.wanted if want else 0.0
                if want:
                    asks.append(Draw(f"{name}/{kind}", want, bucket.limit, bucket.rate_per_s))
            places = state.places
            if places is not None and (count := self._want_places(places, now)) is not None:
                places.asked = places.wanted
                asks.append(Hold(f"{name}/{Kind.CONCURRENT}", self._owner, count, places.limit, HOLD_S))
            is_idle = now - state.seen_s > FORGET_S and not any(bucket.here for bucket in state.buckets.values())
            if is_idle and (places is None or not (places.used or places.held)):
                del self._tenants[name]
        return asks

    def given(self, asks: Sequence[Ask], given: Sequence[Given], now: float) -> None:
        """What a call for `asks` brought."""
        for ask, got in zip(asks, given, strict=True):
            name, _, kind = ask.name.rpartition("/")
            state = self._tenants.get(name)
            if state is None:
                continue
            if isinstance(ask, Hold):
                if state.places is not None:
                    self._take_places(state.places, ask, got, now)
            elif (bucket := state.buckets.get(Kind(kind))) is not None:
                bucket.here += got.amount
                bucket.level, bucket.heard_s = got.left, now
                if got.amount < ask.want - _NEARLY:
                    missing = min(ask.want, bucket.asked or ask.want) - got.amount
                    bucket.pause_until_s = now + min(MAX_PAUSE_S, max(MIN_PAUSE_S, missing / bucket.rate_per_s))
                bucket.wanted, bucket.asked = max(0.0, bucket.wanted - bucket.asked), 0.0

    def _want(self, bucket: _Bucket, now: float) -> float:
        """Below 0: that much goes back; 0: nothing is to be done."""
        if bucket.here > 0 and not bucket.wanted and now - bucket.spent_s > IDLE_S:
            return -bucket.here
        if now < bucket.pause_until_s and not bucket.wanted:
            return 0.0
        pace_per_s = bucket.pace_per_s * math.exp(-max(0.0, now - bucket.spent_s))
        reserve = min(pace_per_s * self._slice_s, bucket.limit * self._slice_share)
        if bucket.here - bucket.wanted >= reserve / 2:
            return 0.0
        return max(0.0, bucket.wanted + reserve - bucket.here)

    def _want_places(self, places: _Places, now: float) -> int | None:
        """How many to hold from now on; None: it stays as it is."""
        if places.used >= places.most or now >= places.most_until_s:
            places.most, places.most_until_s = places.used, now + RELEASE_S
        more = places.wanted + int(self._slice_share * places.limit) if places.wanted else 0
        want = min(places.limit, places.most + more)
        is_due = bool(want) and now >= places.held_until_s - HOLD_S / 2
        has_more = want > places.held and now >= places.pause_until_s
        return want if is_due or has_more or want < places.held else None

    @staticmethod
    def _take_places(places: _Places, ask: Hold, got: Given, now: float) -> None:
        places.held, places.held_until_s = int(got.amount), now + HOLD_S
        if got.amount < ask.want:
            places.pause_until_s = now + MIN_PAUSE_S
        places.wanted, places.asked = max(0, places.wanted - places.asked), 0

    def _state(self, tenant: str, limits: TenantLimits, now: float) -> _Tenant:
        """With the limits as they are now."""
        state = self._tenants.get(tenant)
        if state is None:
            state = self._tenants[tenant] = _Tenant()
        state.seen_s = now
        wanted = (limits.requests_per_min, limits.input_tokens_per_min, limits.output_tokens_per_min)
        for kind, limit in zip(BUCKETS, wanted, strict=True):
            bucket = state.buckets.get(kind)
            if not limit:
                state.buckets.pop(kind, None)
            elif bucket is None:
                state.buckets[kind] = _Bucket(limit, level=limit, heard_s=now, spent_s=now)
            elif bucket.limit != limit:
                bucket.limit, bucket.pause_until_s = limit, 0.0
        if not limits.max_concurrent:
            state.places = None
        elif state.places is None:
            state.places = _Places(limits.max_concurrent)
        else:
            state.places.limit = limits.max_concurrent
        return state
