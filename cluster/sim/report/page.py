"""One self-contained HTML page of a simulation: figures, and charts on one time axis. It loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from cluster.sim.record import RunRecord
from cluster.sim.report.series import ROLES, Series, make_series
from cluster.sim.report.summary import PERCENTS, Summary, WorkerUse, summarize
from cluster.sim.report.svg import LEFT, RIGHT, WIDTH, Line, band_chart, line_chart, stacked_chart
from cluster.sim.report.table import milliseconds, target_text, values

MAX_WORKER_ROWS = 64
"""Of the table; beyond that, roles stand for their workers."""
MAX_EVENT_ROWS = 50


def page(record: RunRecord, title: str = "Simulation") -> str:
    """The page's text."""
    summary, series = summarize(record), make_series(record)
    template = Template(files("cluster.sim.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        intro=_intro(record, summary),
        cards=_cards(summary),
        charts=_charts(series, summary, record.duration_s),
        percentiles=_percentiles(summary),
        uses=_uses(summary),
        events=_events(record),
        data=_data(series),
    )


def _intro(record: RunRecord, summary: Summary) -> str:
    settings = ", ".join(
        f"{name} {value}"
        for name, value in record.settings.items()
        if isinstance(value, str | int | float) and value != ""
    )
    target = target_text(summary.targets[0]) if len(summary.targets) == 1 else "each request's own targets"
    lines = [f"{settings}, seed {record.seed}", f"Good means: ended well within {target}."]
    return "".join(f"<p>{escape(line.strip(', '))}</p>" for line in lines)


def _cards(summary: Summary) -> str:
    cards = (
        (f"{summary.good_share:.1%}", f"good, of {summary.num_requests:,} requests"),
        (f"{summary.goodput_per_s:.2f}/s", "goodput"),
        (_ms(summary.ttft.p50), f"TTFT p50, p90 {_ms(summary.ttft.p90)}"),
        (_ms(summary.tpot.p50), f"TPOT p50, p90 {_ms(summary.tpot.p90)}"),
        (f"{summary.input_tokens_per_s:,.0f}", f"input tokens/s, {summary.cached_share:.0%} cached"),
        (f"{summary.output_tokens_per_s:,.0f}", "output tokens/s"),
        (f"{summary.queue_share_of_ttft:.1%}", "of TTFT in queues"),
        (f"{summary.transfer_share_of_ttft:.1%}", "of TTFT in KV transfer"),
        (f"{summary.num_switches}", "role switches"),
        (f"{summary.num_faults}", "faults"),
    )
    return "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)


def _charts(series: Series, summary: Summary, duration_s: float) -> str:
    end = max(duration_s, series.edge_s[-1])
    marks = [*series.switches, *(at_s for at_s, _ in series.faults)]
    ttft, tpot = summary.targets[0] if len(summary.targets) == 1 else (None, None)
    roles = [role for role in ROLES if any(series.role_counts[role])]
    counts = [Line(role, series.role_counts[role], role) for role in roles]
    busy = [Line(role, series.role_busy[role], role) for role in roles if role in series.role_busy]
    rows = [(_row_title(band.name, band.num_workers), band.roles, band.busy) for band in series.bands]
    waiting = Line("waiting", series.waiting, "two", True)
    parts: tuple[tuple[str, list[Line], dict[str, Any]], ...] = (
        ("Load, requests/s", _pair("arriving", series.arrivals_per_s, "ended", series.ended_per_s), {}),
        ("Output, tokens/s", [Line("tokens", series.output_tokens_per_s, "one", True)], {}),
        ("Requests", [waiting, Line("running", series.running, "one")], {}),
        ("Within targets, by arrival", [Line("good", _times(series.attainment, 100), "one", True)], {"top": 100.0, "unit": "%"}),
        ("TTFT, s, by arrival", _pair("p50", series.ttft_p50_s, "p90", series.ttft_p90_s), {"limit": ttft}),
        ("TPOT, ms, by arrival", _pair("p50", _times(series.tpot_p50_s, 1e3), "p90", _times(series.tpot_p90_s, 1e3)),
         {"limit": None if tpot is None else tpot * 1e3}),
        ("Busy, by role", [Line(each.name, _times(each.values, 100), each.style) for each in busy], {"top": 100.0, "unit": "%"}),
        ("KV pools in use", [Line("used", _times(series.kv_used, 100), "one", True)], {"top": 100.0, "unit": "%"}),
    )  # fmt: skip
    drawn = [
        _section(name, lines, line_chart(name, lines, end, marks=marks, **options)) for name, lines, options in parts
    ]
    if counts:
        drawn.insert(3, _section("Workers by role", counts, stacked_chart("Workers by role", counts, end, marks=marks)))
    if rows:
        each = (
            "one row a worker"
            if len(rows) == len(summary.workers)
            else f"{len(summary.workers)} workers in {len(rows)} rows"
        )
        title = f"Workers: colour is role, strength is busy ({each})"
        drawn.append(_section(title, counts, band_chart(title, rows, end, marks)))
    return "".join(drawn)


def _pair(first: str, ones: Sequence[float | None], second: str, twos: Sequence[float | None]) -> list[Line]:
    return [Line(first, ones, "one", True), Line(second, twos, "two")]


def _section(name: str, lines: Sequence[Line], chart: str) -> str:
    legend = "".join(f'<span><i class="{line.style}"></i>{escape(line.name)}</span>' for line in lines)
    return f'<h2>{escape(name)}<span class="legend">{legend}</span></h2>{chart}'


def _row_title(name: str, num_workers: int) -> str:
    return name if num_workers == 1 else f"{name} ({num_workers})"


def _percentiles(summary: Summary) -> str:
    head = ["", *("max" if percent == 100 else f"p{percent}" for percent in PERCENTS)]
    rows = [
        [name, *map(milliseconds, values(spread))]
        for name, spread in (
            ("TTFT", summary.ttft),
            ("TPOT", summary.tpot),
            ("End to end", summary.e2e),
            ("Longest gap between tokens", summary.max_gap),
        )
    ]
    return _table(head, rows)


def _uses(summary: Summary) -> str:
    many = len(summary.workers) > MAX_WORKER_ROWS
    head = [
        "role" if many else "worker",
        "workers" if many else "role",
        "busy",
        "KV mean",
        "KV peak",
        "running",
        "waiting",
    ]
    shown = summary.roles if many else summary.workers
    return _table(head, [_use_row(use, many) for use in shown])


def _use_row(use: WorkerUse, many: bool) -> list[str]:
    shares = (use.busy, use.kv_used, use.kv_peak)
    counts = (use.mean_running, use.mean_waiting)
    second = str(use.num_workers) if many else use.role
    return [use.name, second, *(f"{share:.1%}" for share in shares), *(f"{count:.1f}" for count in counts)]


def _events(record: RunRecord) -> str:
    happened = [(each.at_s, f"{each.worker} is {each.role}, generation {each.generation}") for each in record.switches]
    happened += [(each.at_s, each.text or f"{each.kind} {each.target}") for each in record.faults]
    if not happened:
        return ""
    happened.sort()
    more = f"<p>and {len(happened) - MAX_EVENT_ROWS} more</p>" if len(happened) > MAX_EVENT_ROWS else ""
    rows = [[f"{at_s:.3f} s", text] for at_s, text in happened[:MAX_EVENT_ROWS]]
    return f'<h2>Switches and faults</h2><div class="wide">{_table(["time", "what"], rows)}</div>{more}'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _data(series: Series) -> str:
    """What the cursor reads, as JSON that cannot end its script element."""
    shown = {
        "arriving/s": series.arrivals_per_s,
        "ended/s": series.ended_per_s,
        "tokens/s": series.output_tokens_per_s,
        "waiting": series.waiting,
        "running": series.running,
        "good %": _times(series.attainment, 100),
        "TTFT p90 s": series.ttft_p90_s,
        "TPOT p90 ms": _times(series.tpot_p90_s, 1e3),
        **{role: series.role_counts[role] for role in ROLES if any(series.role_counts[role])},
    }
    document = {
        "width": WIDTH, "left": LEFT, "right": RIGHT,
        "edges": [round(edge, 4) for edge in series.edge_s[:-1]],
        "values": {name: [None if v is None else float(f"{v:.5g}") for v in found] for name, found in shown.items()},
        "rows": [_row_title(band.name, band.num_workers) for band in series.bands],
    }  # fmt: skip
    return json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")


def _times(found: Sequence[float | None], factor: float) -> list[float | None]:
    return [None if value is None else value * factor for value in found]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s" if seconds >= 10 else f"{milliseconds(seconds)} ms"
