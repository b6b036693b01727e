"""Turns the measured figures of bench/engine.py into Markdown tables. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from targets import WORKLOADS, fraction, ratio, verdicts

TITLES = {
    "baton": "Baton",
    "transformers": "generate",
    "continuous": "generate_batch",
    "llama": "llama.cpp",
}
_MEMORY = (
    ("load, s", "load_s", 1.0),
    ("peak RSS of the load / weights", "load growth", 1.0),
    ("of it private, after the load", "private growth", 1.0),
    ("highest RSS, MiB", "peak_bytes", 2.0**-20),
)


def report(results: Mapping[str, Any]) -> str:
    """The whole report of a run."""
    machine = results["machine"]
    lines = [
        f"{machine['date']}, {machine['cpu']}, {machine['num_cores']} cores. Threads of each engine: "
        f"{machine['num_threads']}. Rounds: {results['repeats']}, medians shown. It took {machine['seconds'] / 60:.0f} minutes.",
        f"Reached beside it: read {machine['read_bytes_per_s'] / 1e9:.1f} GB/s, bf16 {machine['flops_per_s'] / 1e9:.0f} GFLOP/s. "
        f"Other programs took {machine['foreign_share']:.0%} of the cores.",
    ]
    for engine, state in results["engines"].items():
        lines.append(f"- {TITLES[engine]}: {state}")
    for name, model in results["models"].items():
        lines += ["", *_model_report(name, model)]
    return "\n".join(lines)


def _model_report(name: str, model: Mapping[str, Any]) -> Iterator[str]:
    figures, limits = model["figures"], model["limits"]
    shown = [engine for engine in TITLES if engine in figures]
    peers = [engine for engine in shown if engine != "baton"]
    yield f"### {name}: {model['total_params'] / 1e6:.0f} M parameters, {model['active_params'] / 1e6:.0f} M active, bf16"
    yield ""
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
            for measure in WORKLOADS
        ),
    )
    yield ""
    yield from table(
        ["memory", *(TITLES[e] for e in shown)],
        (
            [title, *(number(_scaled(figures[e].get(key), factor), 0 if factor < 1 else 2) for e in shown)]
            for title, key, factor in _MEMORY
        ),
    )
    yield ""
    yield from table(
        ["target", "reached", "wanted", "met"],
        (
            [v.name, number(v.value, 3), f"{'<=' if v.at_most else '>='} {v.bound:g}", _word(v.is_met)]
            for v in verdicts(name, figures, limits)
        ),
    )
    yield ""
    for line in model["tokens"]:
        yield f"- {line}"
    for line in model["failures"]:
        yield f"- failed: {line}"


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
