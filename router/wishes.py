"""What a client wants of a request beside its tokens: how soon, with whom, and whether to be told why it went where it went."""

from __future__ import annotations

from dataclasses import dataclass

import xxhash


@dataclass(frozen=True, slots=True)
class Wishes:
    """Seconds; 0: not said. None of these changes a token, and no worker hears of them."""

    ttft_s: float = 0.0
    """From arrival to the first token, at most."""
    tpot_s: float = 0.0
    """Between two tokens, on average, at most."""
    session: int = 0
    """Requests that belong together have the same number; 0: it belongs to none."""
    explain: bool = False
    """Say what was considered when it was routed."""
    timeout_s: float = 0.0
    """From arrival to the last token, at most."""
    tenant: str = ""
    """Whose request it is; empty: of nobody in particular. Tenants share the queue by `weight`."""
    weight: float = 1.0
    round: int = 0
    """Of a beam search, whose rounds are requests of one token each, the number from 1; 0: of none. Rounds do not tell how long answers
    are; from the second on they are no arrivals either, and no target for first tokens counts."""


NO_WISHES = Wishes()


def session_number(name: str) -> int:
    """The number of a session that a client calls so."""
    return xxhash.xxh3_64_intdigest(name.encode())
