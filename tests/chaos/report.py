"""Writes the result of a chaos run as tables of counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from chaos.faults import Kind, Step, combinations
from chaos.run import Outcome, Recovery, Result


def table(results: Sequence[Result], row: Callable[[Outcome], str], rows: Sequence[str], title: str) -> str:
    """One line for each value of `row`: requests planned, injected, how they recovered, exact and failed."""
    heads = [title, "requests", "injected", *(recovery.value for recovery in reversed(Recovery)), "exact", "failed"]
    outcomes = [outcome for result in results for outcome in result.outcomes]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for name in (*rows, "all"):
        chosen = [o for o in outcomes if name in ("all", row(o))]
        if not chosen:
            continue
        hows = Counter(outcome.recovery for outcome in chosen)
        failed = sum(1 for outcome in chosen if outcome.trouble)
        counts = [len(chosen), sum(o.injected for o in chosen), *(hows[r] for r in reversed(Recovery))]
        lines.append([name, *(str(count) for count in (*counts, len(chosen) - failed, failed))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def summary(result: Result) -> str:
    """One arena in a few lines: what happened, and what should not have."""
    lines = [
        f"{result.transport}: {'good' if result.is_good else 'NOT GOOD'}, {len(result.outcomes)} requests in "
        f"{result.seconds:.0f} s, {result.num_killed} processes killed, {result.num_stopped} stopped, "
        f"{result.num_switched} role switches, {result.num_drained} drains, {result.num_moved} running requests moved, "
        f"leaks: {len(result.leaks)}"
    ]
    lines += [f"  LEAK {leak}" for leak in result.leaks]
    lines += [f"  WRONG {o.request_id} ({o.planned}): {o.trouble}" for o in result.outcomes if o.trouble]
    return "\n".join(lines)


def report(results: Sequence[Result], seed: int, kinds: Sequence[Kind]) -> str:
    """The whole report, Markdown."""
    outcomes = [outcome for result in results for outcome in result.outcomes]
    struck = [outcome.planned for outcome in outcomes if outcome.planned is not None and outcome.injected]
    reached = {(fault.kind, fault.step) for fault in struck}
    parts = [
        table(results, lambda o: o.planned.kind.value if o.planned else "none", ["none", *Kind], "fault"),
        table(results, lambda o: o.planned.step.value if o.planned else "none", ["none", *Step], "step"),
        table(results, lambda o: o.request_id.rpartition("-")[0], [r.transport for r in results], "transport"),
    ]
    parts += [summary(result) for result in results]
    missing = [f"{kind}/{step}" for kind, step in combinations() if kind in kinds and (kind, step) not in reached]
    parts.append(
        f"seed {seed}: {len(outcomes)} requests, {len(struck)} faults injected, {len(reached)} combinations of fault and step"
    )
    if missing:
        parts.append(f"not reached: {', '.join(missing)}")
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    parts.append(f"slowest request: {slowest.seconds:.1f} s ({slowest.planned})")
    return "\n\n".join(parts)
