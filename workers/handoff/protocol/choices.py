"""What the receiver of a handoff chooses: the transports to try, whether a pull is worth its time, and how to go on after a fault, by the time that is left. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from workers.config import BEST_FIRST, SAME_HOST

SMOOTHING = 0.3
"""Weight of the newest measurement."""


class Recovery(StrEnum):
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
class RecoveryChoice:
    """`expected_s` is the estimate for it; `fits` says whether it is within the remaining time."""

    recovery: Recovery
    expected_s: float
    fits: bool


def choose(situation: Situation, measured: Measured) -> RecoveryChoice:
    """The first way that fits the remaining time; if none does, the fastest. What was never measured counts as fitting."""
    estimates = _estimates(situation, measured)
    for way, expected_s in estimates.items():
        if expected_s <= situation.remaining_s:
            return RecoveryChoice(way, expected_s, True)
    fastest = min(estimates, key=lambda way: estimates[way])
    return RecoveryChoice(fastest, estimates[fastest], False)


def _estimates(situation: Situation, measured: Measured) -> Mapping[Recovery, float]:
    """Seconds to the first token by each way that is open, in order of preference."""
    estimates: dict[Recovery, float] = {}
    if situation.can_resend:
        # The source computes on while it sends again; the later of the two ends it.
        resend_s = _duration(situation.missing_bytes, measured.bandwidth)
        estimates[Recovery.NEXT_TRANSPORT] = max(situation.source_left_s, resend_s)
    if situation.others:
        compute_s = _duration(situation.num_tokens, measured.source_rates.get(situation.others[0]))
        estimates[Recovery.NEXT_SOURCE] = compute_s + _duration(situation.total_bytes, measured.bandwidth)
    estimates[Recovery.LOCAL] = _duration(situation.num_tokens, measured.own_rate)
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
    ) -> RecoveryChoice:
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


MEMORY_S = 30.0
"""An older measurement is forgotten, and the next pull measures again."""
MAX_PEERS = 256
WEIGHT = 0.3
"""Of the newest pull in a peer's moving average."""


def is_worth_pulling(num_tokens: int, num_bytes: int, prefill_tokens_per_s: float, pull_bytes_per_s: float) -> bool:
    """Whether pulling is faster than computing. A rate of 0 is not known: then pulling is tried, which measures it."""
    if prefill_tokens_per_s <= 0 or pull_bytes_per_s <= 0:
        return True
    return num_bytes / pull_bytes_per_s < num_tokens / prefill_tokens_per_s


class PullRates:
    """Bytes per second of recent pulls, from opening to landing, by peer; a failed pull counts as no bytes in its time."""

    def __init__(self) -> None:
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def note(self, peer: str, num_bytes: int, seconds: float, now: float) -> None:
        rate, known = num_bytes / max(seconds, 1e-6), self.rate(peer, now)
        self._rates[peer] = (known + (rate - known) * WEIGHT if known else max(rate, 1.0), now)
        self._rates.move_to_end(peer)
        while len(self._rates) > MAX_PEERS:
            self._rates.popitem(last=False)

    def rate(self, peer: str, now: float) -> float:
        """0: not known."""
        rate, measured_s = self._rates.get(peer, (0.0, 0.0))
        return rate if now - measured_s <= MEMORY_S else 0.0


def negotiate(
    wanted: Sequence[str], offers: Mapping[str, bytes], source_host: str, target_host: str
) -> tuple[str, ...]:
    """The receiver's `wanted` transports, in its order, that the sender has offered and that these two hosts allow.

    A name said twice counts once; names that nobody knows are passed over, so that releases can differ.
    """
    is_near = source_host == target_host
    usable = [
        name for name in dict.fromkeys(wanted)
        if name in BEST_FIRST and offers.get(name) is not None and (is_near or name not in SAME_HOST)
    ]  # fmt: skip
    return tuple(usable)
