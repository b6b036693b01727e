"""A summary as text: what `baton simulate` prints."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.sim.report.summary import PERCENTS, Spread, Summary, WorkerUse

MAX_WORKERS_SHOWN = 16
"""Beyond that, roles stand for their workers."""


def summary_table(summary: Summary) -> str:
    """Figures, percentiles in milliseconds, and the use of workers, of roles where there are many."""
    outcomes = ", ".join(f"{count} {name}" for name, count in summary.outcomes.items() if name != "ok")
    lines = [
        _line("requests", f"{summary.num_requests}", f"{summary.num_ok} ok" + (f", {outcomes}" if outcomes else "")),
        _line("virtual time", f"{summary.duration_s:,.1f} s", _simulated(summary)),
        _line(
            "goodput", f"{summary.goodput_per_s:.3f}/s", f"{summary.good_share:.1%} of all requests{_within(summary)}"
        ),
        _line("completed", f"{summary.requests_per_s:.3f}/s", ""),
        _line("input tokens", f"{summary.input_tokens_per_s:,.0f}/s", f"{summary.cached_share:.1%} cached"),
        _line("output tokens", f"{summary.output_tokens_per_s:,.0f}/s", ""),
        _line(
            "in queues",
            f"{summary.queue_share:.1%}",
            f"of all time, {summary.queue_share_of_ttft:.1%} of time to first token",
        ),
        _line(
            "in transfer",
            f"{summary.transfer_share:.1%}",
            f"of all time, {summary.transfer_share_of_ttft:.1%} of time to first token",
        ),
    ]
    if summary.num_switches:
        lines.append(_line("role switches", f"{summary.num_switches}", f"by {len(summary.switches_by_worker)} workers"))
    if summary.num_faults:
        lines.append(_line("faults", f"{summary.num_faults}", ""))
    lines += ["", f"{'ms':<16}" + "".join(f"{_percent(percent):>11}" for percent in PERCENTS)]
    for name, spread in (
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("end to end", summary.e2e),
        ("longest gap", summary.max_gap),
    ):
        lines.append(f"{name:<16}" + "".join(f"{milliseconds(value):>11}" for value in values(spread)))
    return "\n".join([*lines, "", *_uses(summary)])


def values(spread: Spread) -> tuple[float | None, ...]:
    return (spread.p50, spread.p90, spread.p95, spread.p99, spread.p100)


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:,.2f}" if value < 0.1 else f"{value * 1000:,.0f}"


def _uses(summary: Summary) -> list[str]:
    many = len(summary.workers) > MAX_WORKERS_SHOWN
    shown: Sequence[WorkerUse] = summary.roles if many else summary.workers
    if not shown:
        return []
    head = f"{'role' if many else 'worker':<16}{'workers' if many else 'role':>10}"
    lines = [head + "".join(f"{name:>11}" for name in ("busy", "KV mean", "KV peak", "running", "waiting"))]
    for use in shown:
        second = str(use.num_workers) if many else use.role
        lines.append(
            f"{use.name:<16}{second:>10}{use.busy:>11.1%}{use.kv_used:>11.1%}{use.kv_peak:>11.1%}"
            f"{use.mean_running:>11.1f}{use.mean_waiting:>11.1f}"
        )
    return lines


def _line(name: str, value: str, note: str) -> str:
    return f"{name:<16}{value:>14}   {note}".rstrip()


def _simulated(summary: Summary) -> str:
    if not summary.wall_s:
        return ""
    return f"simulated in {summary.wall_s:.1f} s, {summary.events_per_s:,.0f} events/s, {summary.peak_rss_bytes / 2**20:,.0f} MiB"


def _within(summary: Summary) -> str:
    return f" within {target_text(summary.targets[0])}" if len(summary.targets) == 1 else " within their targets"


def target_text(pair: tuple[float | None, float | None]) -> str:
    ttft, tpot = pair
    parts = [f"TTFT {ttft or 0:g} s"] * (ttft is not None) + [f"TPOT {(tpot or 0) * 1000:g} ms"] * (tpot is not None)
    return ", ".join(parts) or "no target"


def _percent(percent: int) -> str:
    return "max" if percent == 100 else f"p{percent}"
