"""Why a request went where it went: the candidates, what each would have cost by part, and who was taken. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.policies.policy import Reason, Route, Weighed

MAX_CANDIDATES = 8
"""Of each kind, the best of them."""


@dataclass(frozen=True, slots=True)
class Option:
    """One worker. `costs` are named after the parts of the policy, in seconds but for those that count."""

    worker_id: str
    cost: float
    costs: dict[str, float]
    cached_blocks: int
    is_kept: bool
    """False: a filter of the policy has left it out."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How one attempt was routed. `waited_s` is what the request spent in the router's queue before it."""

    policy: str
    decode_worker: str
    prefill_workers: tuple[str, ...]
    reason: Reason
    is_local: bool
    """The decode worker computes the prompt."""
    waited_s: float
    ttft_s: float
    """Expected from here on; 0: the policy does not ask. So is the next one."""
    tpot_s: float
    num_decode_candidates: int
    num_prefill_candidates: int
    decode: tuple[Option, ...]
    prefill: tuple[Option, ...]


def explain(
    policy: str,
    ids: Sequence[str],
    route: Route,
    waited_s: float,
    decode: Sequence[Weighed],
    prefill: Sequence[Weighed],
) -> Decision:
    """`decode` and `prefill`: all that was weighed. The chosen ones are shown whether or not they are among the best."""
    return Decision(
        policy=policy,
        decode_worker=ids[route.decode],
        prefill_workers=tuple(ids[row] for row in route.prefill),
        reason=route.reason,
        is_local=not route.prefill,
        waited_s=waited_s,
        ttft_s=route.ttft_s,
        tpot_s=route.tpot_s,
        num_decode_candidates=len(decode),
        num_prefill_candidates=len(prefill),
        decode=_best(ids, decode, (route.decode,)),
        prefill=_best(ids, prefill, route.prefill),
    )


def _best(ids: Sequence[str], weighed: Sequence[Weighed], chosen: tuple[int, ...]) -> tuple[Option, ...]:
    places = {row: place for place, row in enumerate(chosen)}
    last = len(places)
    ranked = sorted(weighed, key=lambda w: (places.get(w.row, last), not w.is_kept, w.cost))[:MAX_CANDIDATES]
    return tuple(
        Option(
            worker_id=ids[candidate.row],
            cost=candidate.cost,
            costs={part.name: part.cost for part in candidate.parts},
            cached_blocks=candidate.num_cached_blocks,
            is_kept=candidate.is_kept,
        )
        for candidate in ranked
    )


def route_of(decisions: Sequence[Decision | None]) -> dict[str, str | float]:
    """The first decision in short, for a span; empty where there is none."""
    decision = next(iter(decisions), None)
    if decision is None:
        return {}
    return {
        "policy": decision.policy,
        "reason": decision.reason.value,
        "decode_worker": decision.decode_worker,
        "prefill_worker": decision.decode_worker if decision.is_local else decision.prefill_workers[0],
        "expected_ttft_s": decision.ttft_s,
        "expected_tpot_s": decision.tpot_s,
        "candidates": " ".join(f"{one.worker_id}={one.cost:.4g}" for one in decision.decode),
    }
