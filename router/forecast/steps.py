"""Learns how long workers' steps take from the steps that they report, and writes what it knows into the columns of the table.

One fit for all workers of a kind, and beside it the speed of each: how its last steps compare with the fit. So a worker that has
computed no prompt yet is known by those of its kind, and one that becomes slow is known to be slow after a few steps.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.fleet.worker_table import NUM_RATIOS, WorkerTable
from router.forecast.fit import LinearFit
from workers.status import WorkerStatus

WORK = ("step", "decode", "context", "prompt", "prompt_context")
"""What a step's time is made of: itself, sequences that get a token, tokens of these whose KV is read, prompt tokens, and
tokens that these look back at."""
PROMPT_TOKEN_S = 1e-4
"""Before anything has been measured. Only its relation to other such times matters then."""
PRIOR_S = (1e-3, PROMPT_TOKEN_S / 4, 1e-9, PROMPT_TOKEN_S, 1e-9)
MAX_KINDS = 8
"""Further kinds are taken for one."""
SLOWEST, FASTEST = 20.0, 0.05
"""Bounds of a worker's speed, as times its steps take in relation to its kind's."""
IDLE_MEMORY = 0.9
"""What each tick leaves of the logarithm of an idle worker's speed: after 2 s, at ten ticks a second, an eighth."""
FORGOTTEN = 0.01
LENT_MEMORY = 0.98
"""What each tick leaves of WorkerTable.lent_s: after LENT_S, at ten ticks a second, about a third."""


@dataclass(frozen=True, slots=True)
class KindForecast:
    """What is known of the workers of a kind. `seconds` by name of work, a unit each."""

    name: str
    num_samples: int
    seconds: tuple[tuple[str, float], ...]


class StepTimes:
    """The fits of all kinds of workers."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, int] = {}
        self._names: list[str] = []
        self._fits: list[LinearFit] = []
        self._looked_back: list[float] = []
        """Tokens that a prompt token of the kind looks back at, as it was lately."""

    def kind_of(self, status: WorkerStatus) -> int:
        """The number of a worker's kind: those that compute the same model in the same way."""
        num_ranks, model = max(1, len(status.ranks)), status.model
        key = (model.fingerprint, status.kv_block_bytes, num_ranks, status.max_num_seqs, status.max_batch_tokens)
        kind = self._kinds.get(key)
        if kind is None:
            kind = min(len(self._kinds), MAX_KINDS - 1)
            if kind == len(self._fits):
                self._fits.append(LinearFit(PRIOR_S, num_groups=2))
                self._looked_back.append(0.0)
                self._names.append(f"{model.name}/{num_ranks}x/{status.max_num_seqs}/{status.max_batch_tokens}")
            if len(self._kinds) < 4 * MAX_KINDS:
                self._kinds[key] = kind
        return kind

    def num_samples(self, kind: int) -> int:
        return self._fits[kind].num_samples

    def learn(self, table: WorkerTable) -> None:
        """Takes the step that each worker has reported last, if it is a new one; vector operations over the workers that have."""
        self._forget_idle(table)
        table.lent_s *= LENT_MEMORY
        rows = np.flatnonzero(table.has_step)
        if not len(rows):
            return
        table.has_step[rows] = False
        work, seconds, kinds = table.steps[rows, :-1], table.steps[rows, -1], table.kinds[rows]
        changed = []
        for kind, fit in enumerate(self._fits):
            of_kind = kinds == kind
            if of_kind.any():
                own = work[of_kind]
                fit.take(own, seconds[of_kind], (own[:, 3] > 0).astype(np.int64))
                self._look_back(kind, own)
                changed.append(kind)
        coefficients = np.array([fit.coefficients for fit in self._fits])[kinds]
        expected = np.maximum((work * coefficients).sum(axis=1), 1e-9)
        table.ratios[rows, table.num_steps[rows] % NUM_RATIOS] = np.clip(seconds / expected, FASTEST, SLOWEST)
        table.num_steps[rows] += 1
        table.speeds[rows] = _middle(table.ratios[rows])
        for kind in changed:
            self._show(table, kind)

    def _forget_idle(self, table: WorkerTable) -> None:
        """A worker without work shows no steps that could clear it of being slow: it comes to be tried again."""
        is_odd = np.abs(table.speeds - 1.0) > FORGOTTEN
        if not is_odd.any():
            return
        is_idle = (table.num_sequences <= 0) & (table.prefill_tokens <= 0) & ~table.has_step & (table.num_steps > 0)
        rows = np.flatnonzero(is_idle & is_odd)
        if len(rows):
            table.ratios[rows] **= IDLE_MEMORY
            table.speeds[rows] = _middle(table.ratios[rows])
            coefficients = np.array([fit.coefficients for fit in self._fits])[table.kinds[rows]]
            table.seconds[rows] = coefficients * table.speeds[rows, None]

    def _look_back(self, kind: int, work: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> None:
        num_tokens, looked_back = float(work[:, 3].sum()), float(work[:, 4].sum())
        if num_tokens:
            known = self._looked_back[kind]
            self._looked_back[kind] += (looked_back / num_tokens - known) * (0.05 if known else 1.0)

    def _show(self, table: WorkerTable, kind: int) -> None:
        """Writes what a unit of work takes into the rows of all workers of a kind."""
        rows = np.flatnonzero(table.kinds == kind)
        table.seconds[rows] = self._fits[kind].coefficients * table.speeds[rows, None]
        table.looked_back[rows] = self._looked_back[kind]
        table.is_known[rows] = self._fits[kind].num_samples > 0

    def show_worker(self, table: WorkerTable, row: int, kind: int) -> None:
        """A worker has come, or is of another kind by now: of itself nothing is known yet."""
        table.kinds[row] = kind
        table.ratios[row] = table.speeds[row] = 1.0
        table.seconds[row] = self._fits[kind].coefficients
        table.looked_back[row] = self._looked_back[kind]
        table.is_known[row] = self._fits[kind].num_samples > 0

    def forecasts(self) -> tuple[KindForecast, ...]:
        """What is known, for operators."""
        return tuple(
            KindForecast(name, fit.num_samples, tuple(zip(WORK, map(float, fit.coefficients), strict=True)))
            for name, fit in zip(self._names, self._fits, strict=True)
        )


def _middle(ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The median of each row; their number is odd."""
    middle: npt.NDArray[np.float64] = np.partition(ratios, NUM_RATIOS // 2, axis=1)[:, NUM_RATIOS // 2]
    return middle
