"""Turns the measured figures of bench/engine.py into Markdown tables. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from targets import Figures, fraction, ratio, verdicts
from workloads import BESIDE_A_BUSY_CORE, LONG, SHORT

TITLES = {
    "baton": "Baton",
    "transformers": "generate",
    "continuous": "generate_batch",
    "llama": "llama.cpp",
}
_MEMORY = (
    ("peak RSS of the load / weights", "load growth", 1.0),
    ("of it private, after the load", "private growth", 1.0),
    ("highest RSS, MiB", "peak_bytes", 2.0**-20),
)
_LOADS = ("cold read, s", "cold load, s", "second load, s")


def report(results: Mapping[str, Any]) -> str:
    """The whole report of a run."""
    machine = results["machine"]
    lines = [
        f"{machine['date']}, {machine['cpu']}, {machine['num_cores']} cores. Rounds: {results['repeats']}, medians shown. "
        f"It took {machine['seconds'] / 60:.0f} minutes. Other programs took {machine['foreign_share']:.0%} of the cores.",
    ]
    for num_threads, reached in machine["reached"].items():
        lines.append(
            f"- Reached beside it with {_threads(num_threads)}: read {reached['read_bytes_per_s'] / 1e9:.1f} GB/s, "
            f"{reached['flops_per_s'] / 1e9:.0f} GFLOP/s ({reached['product']})"
        )
    for engine, state in results["engines"].items():
        lines.append(f"- {TITLES[engine]}: {state}")
    for name, model in results["models"].items():
        lines += ["", *_model_report(name, model)]
    return "\n".join(lines)


def _model_report(name: str, model: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}: {model['total_params'] / 1e6:.0f} M parameters, {model['active_params'] / 1e6:.0f} M active, bf16"
    for run in model["runs"]:
        yield ""
        yield f"{_threads(run['num_threads'])} an engine:"
        yield ""
        yield from _speeds(run["figures"], run["limits"])
        if any(workload.busy_name in run["figures"].get("baton", {}) for workload in BESIDE_A_BUSY_CORE):
            yield ""
            yield from _beside_busy(run["figures"])
    if len(model["runs"]) > 1:
        yield ""
        yield from _scaling(model["runs"])
    last = model["runs"][-1]
    shown = _shown(last["figures"])
    yield ""
    yield from table(
        ["memory and load", *(TITLES[e] for e in shown)], _memory_rows(last["figures"], model["loads"], shown)
    )
    yield ""
    figures = {engine: {**measures, **model["loads"].get(engine, {})} for engine, measures in last["figures"].items()}
    yield from table(
        [f"target, with {_threads(last['num_threads'])}", "reached", "wanted", "met"],
        (
            [v.name, number(v.value, 3), f"{'<=' if v.at_most else '>='} {v.bound:g}", _word(v.is_met)]
            for v in verdicts(name, figures, last["limits"])
        ),
    )
    yield ""
    for engine, text in last["descriptions"].items():
        yield f"- {TITLES[engine]}: {text}"
    for line in model["tokens"]:
        yield f"- {line}"
    for line in [*model["failures"], *(line for run in model["runs"] for line in run["failures"])]:
        yield f"- not measured: {line}"


def _shown(figures: Figures) -> list[str]:
    return [engine for engine in TITLES if engine in figures]


def _speeds(figures: Figures, limits: Mapping[str, float]) -> Iterator[str]:
    shown = _shown(figures)
    peers = [engine for engine in shown if engine != "baton"]
    measured = [w.name for w in (*SHORT, *LONG) if w in SHORT or any(w.name in figures[e] for e in shown)]
    yield from table(
        [
            "tokens/s",
            *(TITLES[e] for e in shown),
            "roofline",
            "Baton / roofline",
            *(f"Baton / {TITLES[e]}" for e in peers),
        ],
        (
            [
                measure,
                *(number(figures[e].get(measure)) for e in shown),
                number(limits.get(measure)),
                number(fraction(figures.get("baton", {}).get(measure), limits.get(measure)), 2),
                *(number(ratio(figures, measure, e), 2) for e in peers),
            ]
            for measure in measured
        ),
    )


def _beside_busy(figures: Figures) -> Iterator[str]:
    """What each engine keeps of its speed."""
    shown = _shown(figures)
    yield from table(
        ["one core busy, over quiet", *(TITLES[e] for e in shown)],
        (
            [w.name, *(number(fraction(figures[e].get(w.busy_name), figures[e].get(w.name)), 2) for e in shown)]
            for w in BESIDE_A_BUSY_CORE
        ),
    )


def _scaling(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each engine gains over the first run's number of threads."""
    first, later = runs[0], runs[1:]
    shown = _shown(first["figures"])
    pairs = [(engine, run) for engine in shown for run in later]
    yield from table(
        [
            f"times the speed with {_threads(first['num_threads'])}",
            *(f"{TITLES[engine]}, {_threads(run['num_threads'])}" for engine, run in pairs),
        ],
        (
            [
                w.name,
                *(
                    number(fraction(run["figures"].get(e, {}).get(w.name), first["figures"][e].get(w.name)), 2)
                    for e, run in pairs
                ),
            ]
            for w in SHORT
        ),
    )


def _memory_rows(
    figures: Figures, loads: Mapping[str, Mapping[str, float]], shown: Sequence[str]
) -> Iterator[Sequence[str]]:
    for measure in _LOADS if loads else ():
        yield [measure, *(number(loads.get(engine, {}).get(measure), 2) for engine in shown)]
    for title, key, factor in _MEMORY:
        yield [title, *(number(_scaled(figures[e].get(key), factor), 0 if factor < 1 else 2) for e in shown)]


def _threads(num_threads: int | str) -> str:
    return f"{num_threads} thread" + ("s" if int(num_threads) > 1 else "")


def table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for place, row in enumerate(cells):
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "| " + " | ".join(padded) + " |"
        if not place:
            yield "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"


def number(value: float | None, digits: int | None = None) -> str:
    """`-` for a missing figure; without `digits`, about three of them."""
    if value is None:
        return "-"
    if digits is None:
        digits = 0 if value >= 100 else 1
    return f"{value:.{digits}f}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _word(is_met: bool | None) -> str:
    return "not measured" if is_met is None else "yes" if is_met else "NO"
