"""Decides how a handoff that met a fault goes on, by the time that is left: resend, another source, or compute here. Pure; knows no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

SMOOTHING = 0.3
"""Weight of the newest measurement."""


class Way(StrEnum):
    """The order is that of preference: the first that fits the remaining time is taken."""

    NEXT_TRANSPORT = "next_transport"
    """The missing pieces again, over the next transport that both ends have."""
    NEXT_SOURCE = "next_source"
    """Another worker computes the prompt."""
    LOCAL = "local"
    """This worker computes the prompt in the reserved blocks."""


@dataclass(slots=True)
class Measured:
    """What recent handoffs and steps have shown: bytes a second over the network, prompt tokens a second here and by source.

    None where nothing has been measured.
    """

    bandwidth: float | None = None
    own_rate: float | None = None
    source_rates: dict[str, float] = field(default_factory=dict)
    max_sources: int = 256

    def landed(self, source: str, kv_bytes: int, transfer_s: float, num_tokens: int, prefill_s: float) -> None:
        """A handoff of `num_tokens` that the source computed in `prefill_s` (its queue included) has landed."""
        if kv_bytes and transfer_s > 0:
            self.bandwidth = _smooth(self.bandwidth, kv_bytes / transfer_s)
        if num_tokens and prefill_s > 0:
            rate = _smooth(self.source_rates.pop(source, None), num_tokens / prefill_s)
            if len(self.source_rates) >= self.max_sources:
                self.source_rates.pop(next(iter(self.source_rates)))
            self.source_rates[source] = rate


def _smooth(before: float | None, new: float) -> float:
    return new if before is None else before + SMOOTHING * (new - before)


@dataclass(frozen=True, slots=True)
class Situation:
    """One fault. `missing_bytes` of `total_bytes` are still to come; `num_tokens` are to be computed by whoever starts afresh;
    `current` is the source at fault, and has still `source_left_s` to compute; `others` are the sources not tried yet, in order.
    """

    remaining_s: float
    missing_bytes: int
    total_bytes: int
    num_tokens: int
    can_resend: bool
    current: str
    others: tuple[str, ...] = ()
    source_left_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """`expected_s` is the estimate for the way taken; `fits` says whether it is within the remaining time."""

    way: Way
    expected_s: float
    fits: bool


def choose(situation: Situation, measured: Measured) -> Choice:
    """The first way that fits the remaining time; if none does, the fastest. What was never measured counts as fitting."""
    estimates = _estimates(situation, measured)
    for way, expected_s in estimates.items():
        if expected_s <= situation.remaining_s:
            return Choice(way, expected_s, True)
    fastest = min(estimates, key=lambda way: estimates[way])
    return Choice(fastest, estimates[fastest], False)


def _estimates(situation: Situation, measured: Measured) -> Mapping[Way, float]:
    """Seconds to the first token by each way that is open, in order of preference."""
    estimates: dict[Way, float] = {}
    if situation.can_resend:
        # The source computes on while it sends again; the later of the two ends it.
        resend_s = _duration(situation.missing_bytes, measured.bandwidth)
        estimates[Way.NEXT_TRANSPORT] = max(situation.source_left_s, resend_s)
    if situation.others:
        compute_s = _duration(situation.num_tokens, measured.source_rates.get(situation.others[0]))
        estimates[Way.NEXT_SOURCE] = compute_s + _duration(situation.total_bytes, measured.bandwidth)
    estimates[Way.LOCAL] = _duration(situation.num_tokens, measured.own_rate)
    return estimates


def _duration(amount: float, rate: float | None) -> float:
    return amount / rate if rate else 0.0


@dataclass(slots=True)
class Plan:
    """What is known of one prompt that comes from elsewhere, for when something goes wrong. Times are of the caller's clock."""

    measured: Measured
    deadline_s: float
    num_tokens: int
    """To be computed by whoever starts afresh."""
    others: tuple[str, ...]
    """Sources not tried yet."""
    current: str = ""
    opened_s: float = 0.0

    def ask(self, source: str, now: float) -> None:
        """A handoff from this source begins."""
        self.current, self.opened_s = source, now
        self.others = tuple(other for other in self.others if other != source)

    def after_fault(
        self,
        now: float,
        *,
        can_resend: bool = False,
        missing_bytes: int = 0,
        total_bytes: int = 0,
        is_computed: bool = False,
    ) -> Choice:
        """How to go on. `is_computed`: the source has computed everything."""
        compute_s = _duration(self.num_tokens, self.measured.source_rates.get(self.current))
        situation = Situation(
            remaining_s=self.deadline_s - now,
            missing_bytes=missing_bytes,
            total_bytes=total_bytes,
            num_tokens=self.num_tokens,
            can_resend=can_resend,
            current=self.current,
            others=self.others,
            source_left_s=0.0 if is_computed else max(0.0, compute_s - (now - self.opened_s)),
        )
        return choose(situation, self.measured)
