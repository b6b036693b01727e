"""The charts of a simulation as one PNG, with matplotlib where it is installed (`baton-serve[plots]`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.sim.record import RunRecord
from cluster.sim.report.series import ROLES, Values, make_series
from cluster.sim.report.summary import summarize
from workers.errors import BatonError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"prefill": "#d97706", "decode": "#2563eb", "mixed": "#059669", "one": "#2563eb", "two": "#d97706"}


class PlotsMissing(BatonError):
    """matplotlib is not installed."""


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display. Raises PlotsMissing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotsMissing('PNG plots need matplotlib: pip install "baton-serve[plots]"') from None
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Raises BatonError when the file cannot be written."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise BatonError(f"{path} cannot be written: {error.strerror}") from None


def write_plots(record: RunRecord, path: Path, title: str = "Simulation") -> None:
    """Load, requests, roles, attainment and times over time, as one PNG. Raises PlotsMissing or BatonError."""
    figure = new_figure(11, 12)
    summary, series = summarize(record), make_series(record)
    axes = figure.subplots(6, 1, sharex=True)
    middle = [(a + b) / 2 for a, b in zip(series.edge_s, series.edge_s[1:], strict=False)]
    ttft, tpot = summary.targets[0] if len(summary.targets) == 1 else (None, None)

    def draw(axis: Any, values: Values, name: str, color: str, factor: float = 1.0) -> None:
        axis.plot(middle, [float("nan") if v is None else v * factor for v in values], label=name, color=color, lw=1.2)

    load, requests, roles, good, first, rest = axes
    draw(load, series.arrivals_per_s, "arriving", COLORS["one"])
    draw(load, series.ended_per_s, "ended", COLORS["two"])
    load.set_ylabel("requests/s")
    draw(requests, series.waiting, "waiting", COLORS["two"])
    draw(requests, series.running, "running", COLORS["one"])
    requests.set_ylabel("requests")
    shown = [role for role in ROLES if any(series.role_counts[role])]
    if shown:
        counts = [[value or 0.0 for value in series.role_counts[role]] for role in shown]
        roles.stackplot(middle, counts, labels=shown, colors=[COLORS[role] for role in shown], step="mid")
    roles.set_ylabel("workers")
    draw(good, series.attainment, "within targets", COLORS["one"], 100)
    good.set_ylim(0, 103)
    good.set_ylabel("good, %")
    draw(first, series.ttft_p50_s, "TTFT p50", COLORS["one"])
    draw(first, series.ttft_p90_s, "TTFT p90", COLORS["two"])
    first.set_ylabel("s")
    draw(rest, series.tpot_p50_s, "TPOT p50", COLORS["one"], 1e3)
    draw(rest, series.tpot_p90_s, "TPOT p90", COLORS["two"], 1e3)
    rest.set_ylabel("ms")
    rest.set_xlabel("virtual time, s")
    for axis, limit in ((first, ttft), (rest, None if tpot is None else tpot * 1e3)):
        if limit is not None:
            axis.axhline(limit, color="#dc2626", ls="--", lw=1)
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="upper right", fontsize=8, ncols=3)
        axis.grid(alpha=0.25)
    figure.suptitle(
        f"{title}: {summary.good_share:.1%} of {summary.num_requests} requests good, {summary.goodput_per_s:.2f}/s"
    )
    save(figure, path)
