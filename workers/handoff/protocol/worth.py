"""Decides whether prefix blocks are pulled from a peer or computed: measured transfer against measured prefill. No clock of its own."""

from __future__ import annotations

from collections import OrderedDict

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
