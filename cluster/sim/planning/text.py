"""A plan in words and tables, and its curves as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.sim.planning.plan import CapacityPlan, Sizing
from cluster.sim.planning.search import Outcome
from cluster.sim.report.plots import COLORS, new_figure, save
from cluster.sim.report.table import milliseconds


def plan_text(plan: CapacityPlan) -> str:
    """The answer first, then the curves that show why, then what is assumed."""
    best = plan.found[0]
    chosen = best.chosen
    lines = [
        f"{best.candidate.profile.name}: {_workers(best)}, starting as {chosen.split}",
        f"{chosen.good_share:.1%} of the requests are good ({plan.slo}; {plan.share:.0%} are wanted), goodput "
        f"{chosen.goodput_per_s:.2f}/s, TTFT p90 {milliseconds(chosen.ttft_p90_s)} ms, TPOT p90 "
        f"{milliseconds(chosen.tpot_p90_s)} ms, workers busy {chosen.busy:.0%}, {chosen.cached_share:.0%} of prompts cached",
    ]
    for role, outcome in best.lost:
        word = "still enough" if outcome.good_share >= plan.share else "not enough"
        lines.append(f"with one {role} worker lost: {outcome.good_share:.1%} good, {word}")
    missed = {role for role, _ in best.lost}
    counts = (("prefill", chosen.split.prefill), ("decode", chosen.split.decode), ("mixed", chosen.split.mixed))
    lines += [
        f"without its only {role} worker nothing is served"
        for role, count in counts
        if count == 1 and role not in missed
    ]
    lines += ["", "over workers, each with its best split:", *_table(best.curve, chosen)]
    lines += ["", f"over splits of {chosen.split.num_workers}:", *_table(best.splits, chosen)]
    if len(plan.found) > 1:
        lines += ["", "other layouts:"]
        lines += [f"  {each.candidate.profile.name}: {_workers(each)}, {each.chosen.split}" for each in plan.found[1:]]
    lines += [f"  not possible: {reason}" for reason in plan.refused]
    return "\n".join([*lines, "", "assumed:", *(f"  - {text}" for text in plan.assumptions)])


def write_plan_plot(plan: CapacityPlan, path: Path) -> None:
    """Good requests over workers, and over splits of the chosen number. Raises PlotsMissing or BatonError."""
    figure = new_figure(11, 4.5)
    best = plan.found[0]
    over, across = figure.subplots(1, 2)
    over.plot(
        [outcome.split.num_workers for outcome in best.curve],
        [outcome.good_share * 100 for outcome in best.curve],
        marker="o",
        color=COLORS["one"],
    )
    over.axhline(plan.share * 100, color="#dc2626", ls="--", lw=1)
    over.axvline(best.chosen.split.num_workers, color="#888888", lw=1)
    over.set_xlabel(f"workers of {best.candidate.num_ranks}, each number with its best split")
    over.set_ylabel("good requests, %")
    names = ["mixed" if o.split.mixed else f"{o.split.prefill}:{o.split.decode}" for o in best.splits]
    colors = [COLORS["two"] if outcome.split == best.chosen.split else COLORS["one"] for outcome in best.splits]
    across.bar(names, [outcome.good_share * 100 for outcome in best.splits], color=colors)
    across.axhline(plan.share * 100, color="#dc2626", ls="--", lw=1)
    across.set_xlabel(f"prefill:decode of {best.chosen.split.num_workers} workers")
    for axis in (over, across):
        axis.set_ylim(0, 103)
        axis.grid(alpha=0.25)
    figure.suptitle(f"{best.candidate.profile.name}, {plan.slo}: {_workers(best)} as {best.chosen.split}")
    save(figure, path)


def _workers(found: Sizing) -> str:
    count, accelerators = found.chosen.split.num_workers, found.num_accelerators
    plural = "s" if count != 1 else ""
    return f"{count} worker{plural}" + (
        f" of {found.candidate.num_ranks} ranks ({accelerators} in all)" if accelerators != count else ""
    )


def _table(outcomes: Sequence[Outcome], chosen: Outcome) -> list[str]:
    lines = [f"  {'split':<28}{'good':>8}{'goodput/s':>11}{'TTFT p90':>12}{'TPOT p90':>11}{'busy':>7}"]
    for each in outcomes:
        mark = "*" if each.split == chosen.split else " "
        lines.append(
            f"{mark} {each.split!s:<28}{each.good_share:>8.1%}{each.goodput_per_s:>11.2f}{milliseconds(each.ttft_p90_s):>12}"
            f"{milliseconds(each.tpot_p90_s):>11}{each.busy:>7.0%}"
        )
    return lines
