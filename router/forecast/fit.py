"""Fits seconds to counts of work by least squares of relative errors, coefficients never negative. Knows neither workers nor time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MAX_SAMPLES = 500
"""What a group of samples weighs at most: older ones fade, so that a fit follows what changes."""
MIN_SAMPLES = 24
"""From so many samples on, those that are far off are taken for outliers."""
CLIP = 3.0
"""An outlier counts as this many times, or as this part of, what was expected."""
PRIOR_WEIGHT = 1e-3
"""Of an imagined sample in which one kind of work alone takes as long as is assumed before anything is known."""


class LinearFit:
    """`seconds ~ work @ coefficients`, in the memory of two small matrices for each group of samples.

    Groups are kinds of samples that must not push each other out: what is known of prompts stays known while only decoding
    is seen.
    """

    def __init__(self, prior: Sequence[float], num_groups: int = 1) -> None:
        """`prior`: seconds of one unit of each kind of work, all positive."""
        self._prior = np.array(prior, np.float64)
        size = len(prior)
        self._scales = np.outer(self._prior, self._prior)
        self._prior_squares = PRIOR_WEIGHT * np.eye(size)
        self._squares = np.zeros((num_groups, size, size))
        self._products = np.zeros((num_groups, size))
        self._weights = [0.0] * num_groups
        self.coefficients: Floats = self._prior.copy()
        self.num_samples = 0
        """All that were ever taken."""

    def expected_s(self, work: Floats) -> Floats:
        """Seconds for rows of work, [N, K] -> [N]."""
        expected: Floats = work @ self.coefficients
        return expected

    def take(self, work: Floats, seconds: Floats, groups: npt.NDArray[np.int64] | None = None) -> None:
        """Samples: work [N, K], seconds [N] above 0, and each one's group [N]. Solves anew."""
        if self.num_samples >= MIN_SAMPLES:
            expected = np.maximum(self.expected_s(work), 1e-9)
            seconds = np.clip(seconds, expected / CLIP, expected * CLIP)
        relative = work / seconds[:, None]
        for group in range(len(self._weights)):
            rows = relative if groups is None else relative[groups == group]
            if len(rows):
                self._add(group, rows)
        self.num_samples += len(seconds)
        self._solve()

    def _add(self, group: int, rows: Floats) -> None:
        """Rows of work in relation to the seconds that it took: each should come to 1."""
        weight = self._weights[group] + len(rows)
        self._squares[group] += rows.T @ rows
        self._products[group] += rows.sum(axis=0)
        if weight > MAX_SAMPLES:
            self._squares[group] *= MAX_SAMPLES / weight
            self._products[group] *= MAX_SAMPLES / weight
            weight = MAX_SAMPLES
        self._weights[group] = weight

    def _solve(self) -> None:
        """Least squares over all groups and the prior; what would be negative is left out, one after another."""
        scale = self._prior
        squares = self._squares.sum(axis=0) * self._scales + self._prior_squares
        products = self._products.sum(axis=0) * scale + PRIOR_WEIGHT
        free = np.arange(len(scale))
        found: Floats = np.linalg.solve(squares, products)
        while len(free) and (worst := int(found.argmin())) >= 0 and found[worst] < 0:
            free = np.delete(free, worst)
            found = np.linalg.solve(squares[np.ix_(free, free)], products[free])
        solution = np.zeros_like(scale)
        solution[free] = found
        self.coefficients = solution * scale
