"""Writes down what happened in a simulation so that a person can read it, and another run can be compared with it. Knows no scenario."""

from __future__ import annotations

from collections import Counter

from cluster.sim.record import RunRecord

_COUNTERS = (
    "routed_local_prefill", "routed_remote_prefill", "handoffs_landed", "handoffs_failed", "handoffs_refused", "handoffs_not_taken",
    "migrations_begun", "migrations_done", "adoptions_begun", "requests_adopted", "preemptions", "replayed_tokens", "cached_tokens",
    "workers_lost_detached", "workers_lost_stale", "workers_lost_restarted", "workers_lost_left", "workers_lost_moved",
)  # fmt: skip


class Transcript:
    """Gathers notices (a Notice) as lines; `text` puts them before what became of the requests."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __call__(self, now: float, text: str) -> None:
        self._lines.append(f"{now:9.3f}  {text}")

    def text(self, run: RunRecord, about: str) -> str:
        """The whole transcript, with figures rounded to what a reader can use."""
        outcomes = Counter(request.outcome for request in run.requests)
        firsts = sorted(request.ttft_s for request in run.requests if request.ttft_s is not None)
        paces = sorted(tpot for request in run.requests if (tpot := request.tpot_s) is not None)
        gaps = max((request.max_gap_s for request in run.requests), default=0.0)
        where = Counter(request.decode_worker for request in run.requests if request.decode_worker)
        lines = [
            f"# {about}",
            "",
            *self._lines,
            "",
            f"requests   {', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items()))}",
            f"TTFT       p50 {_ms(firsts, 50)}  p90 {_ms(firsts, 90)}  max {_ms(firsts, 100)}",
            f"TPOT       p50 {_ms(paces, 50)}  p90 {_ms(paces, 90)}  max {_ms(paces, 100)}",
            f"longest wait between two tokens  {gaps * 1e3:.1f} ms",
            f"decoded by {', '.join(f'{name} {count}' for name, count in sorted(where.items()))}",
            *(f"{name:<24} {run.counters[name]:.0f}" for name in _COUNTERS if run.counters.get(name)),
        ]
        return "\n".join(lines) + "\n"


def _ms(ordered: list[float], percent: int) -> str:
    if not ordered:
        return "-"
    return f"{ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1e3:.1f} ms"
