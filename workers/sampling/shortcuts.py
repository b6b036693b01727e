"""What faster kernels may find out about one row of logits on the host; the plain way beside it decides what is right.

Shapes: V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Shortcuts(Protocol):
    """Rows are contiguous fp32 [V] on the host. None: the plain way has to find out."""

    def candidates(self, logits_V: Tensor, key: int) -> Tensor | None:
        """Token ids, ascending, among which is the largest sum of logit and Gumbel noise; valid until the next call."""

    def drop_below(self, logits_V: Tensor, keys_V: Tensor, threshold: float) -> None:
        """Sets logits to -inf, in place, where the key is not at least the threshold."""

    def nucleus_threshold(self, probabilities_V: Tensor, p: float) -> float | None:
        """The least probability in the nucleus of p, exactly that of workers.sampling.filters."""
