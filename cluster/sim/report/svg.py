"""Charts on a common time axis as SVG text: lines, areas, stacked roles, bands of workers. Knows no record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 1000
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 8, 20
"""Room for values, and for times below."""
Height = Callable[[float], float]
"""From a value to a place from the top."""
BUSY_STEPS = 5
"""Shades of a band."""


@dataclass(frozen=True, slots=True)
class Line:
    """`style` is a class of the page's style sheet, which has its colours."""

    name: str
    values: Sequence[float | None]
    style: str
    is_area: bool = False


def nice_top(highest: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `highest`."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** _floor_log10(highest)
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= highest * 0.999999)


def line_chart(
    name: str, lines: Sequence[Line], end_s: float, *, height: int = 120, top: float | None = None, unit: str = "",
    limit: float | None = None, marks: Sequence[float] = (),
) -> str:  # fmt: skip
    """`limit` is drawn as a dashed line; `marks` are moments of events."""
    highest = max((value for line in lines for value in line.values if value is not None), default=0.0)
    ceiling = top if top is not None else nice_top(max(highest, limit or 0.0))
    plot = height - TOP - BOTTOM
    parts = [_frame(height, ceiling, unit, end_s)]
    for line in lines:
        points = _runs(line.values, lambda value: TOP + plot * (1 - min(value, ceiling) / ceiling))
        for run in points:
            path = " ".join(f"{'L' if place else 'M'}{x:.1f} {y:.1f}" for place, (x, y) in enumerate(run))
            if line.is_area:
                closed = f"{path} L{run[-1][0]:.1f} {TOP + plot} L{run[0][0]:.1f} {TOP + plot} Z"
                parts.append(f'<path class="area {line.style}" d="{closed}"/>')
            parts.append(f'<path class="line {line.style}" d="{path}"/>')
    if limit is not None and limit <= ceiling:
        y = TOP + plot * (1 - limit / ceiling)
        parts.append(f'<path class="limit" d="M{LEFT} {y:.1f} H{WIDTH - RIGHT}"/>')
    parts.append(_marks(marks, end_s, TOP, TOP + plot))
    return _svg(name, height, parts)


def stacked_chart(
    name: str, layers: Sequence[Line], end_s: float, *, height: int = 110, marks: Sequence[float] = ()
) -> str:
    """Counts on top of each other as steps, the first at the bottom."""
    count = len(layers[0].values) if layers else 0
    totals = [sum(layer.values[index] or 0.0 for layer in layers) for index in range(count)]
    ceiling = max(1.0, max(totals, default=1.0))
    plot = height - TOP - BOTTOM
    parts = [_frame(height, ceiling, "", end_s)]
    below = [0.0] * count
    for layer in layers:
        above = [low + (value or 0.0) for low, value in zip(below, layer.values, strict=True)]
        upper = _stairs(above, lambda value: TOP + plot * (1 - value / ceiling))
        lower = _stairs(below, lambda value: TOP + plot * (1 - value / ceiling))
        if above != below:
            path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *reversed(lower)])
            parts.append(f'<path class="solid {layer.style}" d="{path} Z"/>')
        below = above
    parts.append(_marks(marks, end_s, TOP, TOP + plot))
    return _svg(name, height, parts)


def band_chart(
    name: str, rows: Sequence[tuple[str, Sequence[str], Sequence[float | None]]], end_s: float,
    marks: Sequence[float] = (),
) -> str:  # fmt: skip
    """A row each: its title, its style in each interval ("": nothing), and how strongly it is drawn, from 0 to 1."""
    thick = 14 if len(rows) <= 24 else 10
    height = TOP + BOTTOM + thick * max(1, len(rows))
    pieces: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    titles = []
    for place, (title, styles, strengths) in enumerate(rows):
        y = TOP + place * thick
        width = (WIDTH - LEFT - RIGHT) / max(1, len(styles))
        for first, last, shade in _runs_of_shades(styles, strengths):
            x, right = LEFT + first * width, LEFT + last * width
            pieces[shade].append(f"M{x:.1f} {y}H{right:.1f}V{y + thick - 1}H{x:.1f}Z")
        titles.append(
            f'<rect class="row" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{thick}" data-row="{place}">'
            f"<title>{escape(title)}</title></rect>"
        )
        if len(rows) <= 24 or place % 8 == 0:
            short = title if len(title) <= 9 else "…" + title[-8:]
            titles.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y + thick - 3}" text-anchor="end">{escape(short)}</text>'
            )
    parts = [
        f'<path class="solid {style} shade{shade}" d="{"".join(drawn)}"/>'
        for (style, shade), drawn in sorted(pieces.items())
    ]
    parts += [*titles, _times(height, end_s), _marks(marks, end_s, TOP, height - BOTTOM)]
    return _svg(name, height, parts)


def _runs_of_shades(styles: Sequence[str], strengths: Sequence[float | None]) -> list[tuple[int, int, tuple[str, int]]]:
    """Neighbouring intervals that look alike, as one."""
    shades = [
        (style, min(BUSY_STEPS - 1, int((strength or 0.0) * BUSY_STEPS)))
        for style, strength in zip(styles, strengths, strict=True)
    ]
    runs, first = [], 0
    for index in range(1, len(shades) + 1):
        if index == len(shades) or shades[index] != shades[first]:
            if shades[first][0]:
                runs.append((first, index, shades[first]))
            first = index
    return runs


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name, quote=True)}">'
        f'{"".join(parts)}<path class="cursor" d="M0 {TOP}V{height - BOTTOM}"/></svg>'
    )


def _frame(height: float, ceiling: float, unit: str, end_s: float) -> str:
    plot = height - TOP - BOTTOM
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = TOP + plot * (1 - share)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(ceiling * share)}{escape(unit)}</text>'
        )
    return "".join(parts) + _times(height, end_s)


def _times(height: float, end_s: float) -> str:
    """A time at every tenth or so of the axis."""
    step = nice_top(end_s / 10)
    parts = []
    for index in range(int(end_s / step) + 1):
        x = LEFT + (WIDTH - LEFT - RIGHT) * index * step / end_s
        if x > WIDTH - RIGHT - 10 and index:
            break
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{time_text(index * step)}</text>'
        )
    return "".join(parts)


def _marks(moments: Sequence[float], end_s: float, top: float, bottom: float) -> str:
    """One path for all; moments that would be drawn over each other are drawn once."""
    places = sorted({round(LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, at_s / end_s)) for at_s in moments})
    return f'<path class="mark" d="{"".join(f"M{x} {top}V{bottom}" for x in places)}"/>' if places else ""


def _runs(values: Sequence[float | None], height_of: Height) -> list[list[tuple[float, float]]]:
    """Points at the middle of each interval, cut where there is no value; a lone one becomes a dash."""
    step = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    runs: list[list[tuple[float, float]]] = [[]]
    for index, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((LEFT + (index + 0.5) * step, height_of(value)))
    return [run if len(run) > 1 else [run[0], (run[0][0] + 2, run[0][1])] for run in runs if run]


def _stairs(values: Sequence[float], height_of: Height) -> list[tuple[float, float]]:
    step = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    return [(LEFT + (index + side) * step, height_of(value)) for index, value in enumerate(values) for side in (0, 1)]


def time_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 7200 else f"{seconds / 3600:g} h"


def _number(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
