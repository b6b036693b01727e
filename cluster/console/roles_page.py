"""What `baton roles` prints, from the JSON of GET /admin/roles."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cluster.console.output import duration, table

NUM_DECISIONS = 5
NUM_STEPS = 15


def roles_table(page: Mapping[str, Any]) -> str:
    """A line for each worker."""
    if not page:
        return "no role controller runs in this router"
    leader = page["leader"] or "nobody"
    head = f"roles: {page['mode']}, decided by {leader}"
    if page.get("desired_workers"):
        head += f"; the load needs about {page['desired_workers']} workers"
    rows = [_row(worker) for worker in page["workers"]]
    return f"{head}\n\n{table(('WORKER', 'ROLE', 'DESIRED', 'SINCE', 'BY', 'PINNED', 'STATE'), rows)}" if rows else head


def _row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    state = "lost" if not worker["connected"] else "draining" if worker["draining"] else "serving"
    return (
        worker["worker_id"],
        worker["role"],
        worker["desired"],
        _time(worker["since_s"]) if worker["since_s"] else "start",
        worker["by"] or "-",
        "yes" if worker["pinned"] else "no",
        worker["phase"] or state,
    )


def explanation(page: Mapping[str, Any]) -> str:
    """The last decisions, newest first, then the last steps."""
    parts = [roles_table(page)]
    if page.get("last_look"):
        parts.append("Now: " + _decision(page["last_look"]))
    decisions = page.get("decisions", [])[:NUM_DECISIONS]
    parts += [_decision(decision) for decision in decisions] or ["No decision has been kept yet."]
    steps = page.get("audit", [])[-NUM_STEPS:]
    if steps:
        rows = [
            (
                _time(step["at_s"]),
                step["worker_id"],
                f"{step['source']} to {step['target']}",
                step["step"],
                duration(step["took_s"]) if step["took_s"] else "-",
                step["by"],
                step["why"] or step["reason"],
            )
            for step in steps
        ]
        parts.append(table(("AT", "WORKER", "SWITCH", "STEP", "AFTER", "BY", "WHY"), rows))
    return "\n\n".join(parts)


def _decision(decision: Mapping[str, Any]) -> str:
    inputs = decision["inputs"]
    moves = ", ".join(f"{move['worker_id']} {move['from']} to {move['to']}" for move in decision["moves"])
    head = f"{_time(decision['at_s'])}  {moves or 'no change'}: {decision['reason']}"
    if decision["mode"] == "advise":
        head += " (advised only)"
    backlog = f"{inputs['backlog_tokens']:.0f} prompt tokens waiting"
    lines = [
        head,
        f"  inputs        {inputs['requests_per_s']:.2f} requests/s of {inputs['prompt_tokens']:.0f} prompt tokens and "
        f"{inputs['output_tokens']:.0f} output tokens expected; {backlog}; {inputs['num_sequences']} sequences there; in time lately: "
        f"{inputs['ttft_attainment']:.0%} of first tokens, {inputs['tpot_attainment']:.0%} of answers",
        f"  as it was     {_split(decision['now'])}",
        f"  chosen        {_split(decision['chosen'])}, {decision['predicted_gain']:+.2f} good requests/s",
        f"  alternatives  {'; '.join(_split(other) for other in decision['alternatives']) or '-'}",
    ]
    effect = decision["effect"]
    if effect:
        lines.append(
            f"  measured      first tokens in time {effect['ttft_before']:.0%} before, {effect['ttft_after']:.0%} after; "
            f"answers {effect['tpot_before']:.0%} before, {effect['tpot_after']:.0%} after; "
            f"{effect['finished_before']:.2f} answers/s before, {effect['finished_after']:.2f} after"
        )
    return "\n".join(lines)


def _split(alternative: Mapping[str, Any]) -> str:
    split = alternative["split"]
    return f"{split['prefill']}P {split['decode']}D {split['mixed']}M: {alternative['goodput']:.2f}/s"


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S}"
