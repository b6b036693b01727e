"""The policies that there are, by the names that settings give them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from router.policies import scorers
from router.policies.composed import ComposedPolicy
from router.policies.policy import Policy
from router.policies.turns import RandomPolicy, RoundRobinPolicy
from workers.errors import InvalidConfig

_COSTS = (scorers.kv_headroom, scorers.first_token, scorers.answer, scorers.lateness)
_CAREFUL = (scorers.not_avoided, scorers.keeps_pace)
_PLAIN = (scorers.not_avoided,)


def _composed(
    decode: tuple[scorers.Scorer, ...], prefill: tuple[scorers.Scorer, ...], careful: bool
) -> Callable[[int, int], Policy]:
    filters = _CAREFUL if careful else _PLAIN
    return lambda most, seed: ComposedPolicy(decode, prefill, filters, careful, most)


POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "kv_aware": _composed(_COSTS, (scorers.prompt,), True),
    "session_affinity": _composed((*_COSTS, scorers.home), (scorers.prompt,), True),
    "prefix_affinity": _composed((scorers.uncached,), (scorers.uncached,), False),
    "least_loaded": _composed((scorers.sequences,), (scorers.waiting_tokens,), False),
    "round_robin": lambda most, seed: RoundRobinPolicy(most),
    "random": RandomPolicy,
}
"""Each is made from the number of prefill workers that a request may name, and a seed."""


def policy_named(name: str, max_prefill_candidates: int = 3, seed: int = 0) -> Policy:
    """Raises InvalidConfig for a name that no policy has."""
    check_name(name)
    return POLICIES[name](max_prefill_candidates, seed)


def check_name(name: str) -> None:
    """Raises InvalidConfig for a name that no policy has; it says which is meant, perhaps."""
    if name not in POLICIES:
        close = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(POLICIES)}"
        raise InvalidConfig(f"router.policy {name!r:.80} is not known; {hint}")
