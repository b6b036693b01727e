"""A plan for one load: the cheapest of several layouts, why, what a lost worker costs, and what all of it assumes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.sim.planning.question import Asked, Slo, least_workers, require_reachable
from cluster.sim.planning.search import Evaluate, Outcome, Search
from cluster.sim.profiles.profile import Profile
from workers.errors import BatonError, InvalidConfig


class NoPlan(BatonError):
    """No cluster that was tried keeps the targets."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout of a worker, and how many accelerators it takes."""

    profile: Profile
    num_ranks: int


@dataclass(frozen=True, slots=True)
class Sizing:
    """What one layout needs. `curve` has the best split of each number of workers that was tried, `splits` all of the chosen number."""

    candidate: Candidate
    chosen: Outcome
    curve: tuple[Outcome, ...]
    splits: tuple[Outcome, ...]
    lost: tuple[tuple[str, Outcome], ...]

    @property
    def num_accelerators(self) -> int:
        return self.chosen.split.num_workers * self.candidate.num_ranks


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """The cheapest layout first."""

    slo: Slo
    share: float
    found: tuple[Sizing, ...]
    refused: tuple[str, ...]
    """Layouts that cannot do it, each with the reason."""
    assumptions: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "slo": asdict(self.slo),
            "share": self.share,
            "layouts": [
                {
                    "profile": each.candidate.profile.name,
                    "ranks": each.candidate.num_ranks,
                    "workers": each.chosen.split.num_workers,
                    "accelerators": each.num_accelerators,
                    "split": asdict(each.chosen.split),
                    "outcome": asdict(each.chosen),
                    "over_workers": [asdict(outcome) for outcome in each.curve],
                    "over_splits": [asdict(outcome) for outcome in each.splits],
                    "one_lost": {role: asdict(outcome) for role, outcome in each.lost},
                }
                for each in self.found
            ],
            "refused": list(self.refused),
            "assumptions": list(self.assumptions),
        }


def make_plan(
    candidates: Sequence[Candidate],
    requests: Sequence[Asked],
    slo: Slo,
    share: float,
    max_workers: int,
    evaluate: Callable[[Profile], Evaluate],
    assumptions: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
) -> CapacityPlan:
    """Raises InvalidConfig when no candidate could ever meet the targets, NoPlan when none does with `max_workers`."""
    found, refused = [], []
    for candidate in candidates:
        profile = candidate.profile
        try:
            require_reachable(profile, requests, slo, share)
        except InvalidConfig as error:
            refused.append(str(error))
            continue
        say(f"{profile.name}: looking for the least number of workers")
        search = Search(evaluate(profile), share, max_workers)
        chosen = search.least(least_workers(profile, requests))
        if chosen is None:
            best = max(search.known.values(), key=lambda outcome: outcome.good_share)
            refused.append(
                f"{profile.name}: up to {max_workers} workers keep the targets for {best.good_share:.1%} of the requests at best "
                f"({best.split}), and {share:.0%} are wanted"
            )
            continue
        lost = tuple(search.lost(chosen.split))
        splits = tuple(search.splits_of(chosen.split.num_workers))
        found.append(Sizing(candidate, chosen, tuple(search.curve()), splits, lost))
    if not found:
        raise (NoPlan if any("workers keep" in text for text in refused) else InvalidConfig)(refused[0])
    found.sort(key=lambda each: (each.num_accelerators, -each.chosen.good_share))
    return CapacityPlan(slo, share, tuple(found), tuple(refused), tuple(assumptions))
