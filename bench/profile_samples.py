"""Sorts the samples of `perf` by what the engine's threads were doing, going by the names of its C++ functions. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_TASK = re.compile(r"Model<[^{]*?>::(\w+)\([^{]*\)::\{lambda")
"""A task that a function of the model hands to its threads."""
_KINDS = {
    "forward": "queries, keys, values",
    "attend": "attention",
    "add_product": "output and down projections",
    "feed_forward": "gate and up projections",
    "run_experts": "experts",
    "head": "vocabulary",
    "normalize_rows": "norms",
    "place_keys": "rotation",
    "route": "router",
    "combine": "sum of experts",
}
WAITING = "waiting for the other threads"
SERIAL = "waiting, or between the tasks"
PYTHON = "Python and the rest"


@dataclass(frozen=True)
class Sample:
    """One thread's stack, the innermost function first."""

    thread: int
    stack: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Iterator[Sample]:
        """What `perf script -F tid,ip,sym` prints: the thread, one line a frame, an empty line."""
        for paragraph in text.split("\n\n"):
            lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
            if lines:
                yield Sample(int(lines[0].split()[0]), tuple(line.partition(" ")[2] for line in lines[1:]))

    @property
    def kind(self) -> str:
        """What it was doing; a task's name stands somewhere between the kernel and the pool's loop."""
        for frame in self.stack:
            if found := _TASK.search(frame):
                return _KINDS.get(found[1], found[1])
            if "HeadAttention" in frame:
                return _KINDS["attend"]
            if "baton_draw" in frame or "RowDraw" in frame:
                return "drawing"
            if "Pool::" in frame:
                return WAITING
            if "baton_forward" in frame or "baton_head" in frame or re.search(r"Model<[^{]*>::\w+\(", frame):
                return SERIAL
        return PYTHON


def stepping_and_helping(samples: Sequence[Sample], stepping: int) -> tuple[list[Sample], list[Sample]]:
    """Those of the thread that makes the steps, and those of threads that run the kernels' tasks with it."""
    helpers = {s.thread for s in samples if s.thread != stepping and s.kind != PYTHON}
    return [s for s in samples if s.thread == stepping], [s for s in samples if s.thread in helpers]


def shares(samples: Sequence[Sample]) -> dict[str, float]:
    """The share of each kind; empty without samples."""
    counts = Counter(sample.kind for sample in samples)
    return {kind: count / len(samples) for kind, count in counts.most_common()}
