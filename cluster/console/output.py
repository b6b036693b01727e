"""What the command line prints: one line per step with a spinner where somebody watches, and the table of `baton status`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from shutil import get_terminal_size
from threading import Event, Thread
from typing import Any, TextIO

from workers.status import LoadProgress, starts_of, switches_of

LINE_EVERY_S = 15.0
MAX_NAMED = 3
"""Workers that load, the slowest first; of the others their number is said."""

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class StepPrinter:
    """Writes to stderr, so that stdout stays with the result. `quiet` writes nothing."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self.seconds: dict[str, float] = {}
        """How long each finished step took."""
        self._note = ""
        self._noted_s = 0.0

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            with suppress(OSError, ValueError):
                self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
                self._stream.flush()

    def note(self, text: str) -> None:
        """How far the step has come that is being done: beside its spinner, or as a line every LINE_EVERY_S where nobody watches."""
        self._note = text
        now = time.monotonic()
        if not self._live and now - self._noted_s >= LINE_EVERY_S:
            self._noted_s = now
            self.say(f"    {text}")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Shows that `text` is being done, then that it is done and how long it took; failed when it raises."""
        began = self._noted_s = time.monotonic()
        self._note = ""
        over = Event()
        spinner = Thread(target=self._spin, args=(text, over), daemon=True) if self._live else None
        if spinner:
            spinner.start()
        try:
            yield
        except BaseException:
            self._finish(spinner, over)
            self.say(f"  ✗ {text}")
            raise
        self._finish(spinner, over)
        self.seconds[text] = time.monotonic() - began
        self.say(f"  ✓ {text}  {self.seconds[text]:.1f} s")

    def _spin(self, text: str, over: Event) -> None:
        at = 0
        while not over.wait(0.1):
            with suppress(OSError, ValueError):  # a terminal that is gone
                line = f"  {_FRAMES[at % len(_FRAMES)]} {text}{': ' if self._note else ''}{self._note}"
                self._stream.write(f"\r\x1b[K{line[: get_terminal_size().columns - 1]}")
                self._stream.flush()
            at += 1

    @staticmethod
    def _finish(spinner: Thread | None, over: Event) -> None:
        over.set()
        if spinner:
            spinner.join()


_HEADINGS = ("WORKER", "ROLE", "GENERATION", "STATE", "REQUESTS", "RUNNING", "WAITING", "BLOCKS USED", "FRAME AGE")

_RANK_HEADINGS = ("RANK", "HOST:PID", "STATE", "EPOCH", "KV MEMORY", "EXPERT IMBALANCE")


def status_table(status: dict[str, Any]) -> str:
    """The table from the JSON of GET /admin/status."""
    rows = [_row(view) for view in status.get("workers", ())]
    head = f"{status.get('router_id', 'router')}: {status['num_running']} running, {status['num_waiting']} waiting"
    if coming := {each["worker_id"]: LoadProgress(**each["progress"]) for each in status.get("loading", ())}:
        head = f"{head}\nloading: {loading_text(coming)}"
    if not rows:
        return f"{head}; no workers"
    ranks = rank_table(status)
    return f"{head}\n\n{table(_HEADINGS, rows)}" + (f"\n\n{ranks}" if ranks else "")


def loading_text(coming: Mapping[str, LoadProgress]) -> str:
    """`prefill-0 1.2 GiB of 42.0 GiB, layer 3 of 28`: those that are furthest behind, and the number of the others."""
    behind = sorted(coming.items(), key=lambda item: (item[1].num_bytes_read / max(1, item[1].num_bytes), item[0]))
    told = [f"{name} {progress_text(progress)}" for name, progress in behind[:MAX_NAMED]]
    return "; ".join([*told, *([f"and {len(behind) - MAX_NAMED} more"] if len(behind) > MAX_NAMED else [])])


def progress_text(progress: LoadProgress) -> str:
    if not progress.num_bytes:
        return "begins"
    layers = f", layer {progress.num_layers_begun} of {progress.num_layers}" if progress.num_layers else ""
    return f"{size(progress.num_bytes_read)} of {size(progress.num_bytes)}{layers}"


def rank_table(status: dict[str, Any]) -> str:
    """The ranks of those workers that have several; empty when none has."""
    rows = [
        (
            f"{view['status']['worker_id']}/rank-{rank['rank']}",
            f"{rank['host']}:{rank['pid']}" if rank["pid"] else "-",
            "alive" if rank["is_alive"] else "lost",
            str(rank["epoch"] or "-"),
            "leader's" if rank["shares_memory"] else "own",
            f"{dict(view['status']['counters']).get('expert_imbalance', 1.0):.2f}" if not rank["rank"] else "",
        )
        for view in status.get("workers", ())
        for rank in view["status"].get("ranks", ())
    ]
    return table(_RANK_HEADINGS, rows) if rows else ""


def _state(view: dict[str, Any]) -> str:
    if not view["connected"]:
        return "lost"
    status = view["status"]
    if status.get("is_rebuilding"):
        return "rebuilding"
    return "draining" if status.get("is_draining") else "connected"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[at]) for row in (headings, *rows)) for at in range(len(headings))]
    numeric = [all(row[at][:1].isdigit() or row[at] == "-" for row in rows) for at in range(len(headings))]
    lines = []
    for row in (headings, *rows):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Three digits that mean something: 850 µs, 12.3 ms, 4.2 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def size(num_bytes: float) -> str:
    """512 B, 12.5 KiB, 3.0 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _row(view: dict[str, Any]) -> tuple[str, ...]:
    status = view["status"]
    load = status["load"]
    used = load["num_blocks"] - load["num_free_blocks"]
    return (
        status["worker_id"],
        status["role"],
        generation_text(int(status["generation"])),
        _state(view),
        str(view["num_requests"]),
        str(load["num_running"]),
        str(load["num_waiting"]),
        f"{used}/{load['num_blocks']}",
        duration(view["frame_age_s"]),
    )


def generation_text(generation: int) -> str:
    """When the worker was started (UTC), and how often it has switched since: see docs/architecture/threads.md."""
    started = datetime.fromtimestamp(starts_of(generation), UTC)
    return f"{started:%Y-%m-%dT%H:%M:%SZ}/{switches_of(generation)}"
