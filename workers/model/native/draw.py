"""The shortcuts of the C++ kernels for drawing tokens, as workers.sampling wants them; knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.model.native.library import Library

_MAX_CANDIDATES = 256
"""More tokens than these within 0.001 of the winner are left to the plain way."""


class NativeShortcuts:
    """Implements workers.sampling.shortcuts.Shortcuts. Used by one thread at a time."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._tokens = torch.empty(_MAX_CANDIDATES, dtype=torch.int64)
        self._threshold = torch.empty(1)
        self.sums_V = torch.empty(0)
        """What `candidates` found last for each token: its logit and noise, within 1e-5, or -inf."""

    def candidates(self, logits_V: Tensor, key: int) -> Tensor | None:
        size = len(logits_V)
        if len(self.sums_V) != size:
            self.sums_V = torch.empty(size)
        found = self._library.candidates(
            logits_V.data_ptr(), size, key, self.sums_V.data_ptr(), self._tokens.data_ptr(), _MAX_CANDIDATES
        )
        return None if found < 0 else self._tokens[:found]

    def drop_below(self, logits_V: Tensor, keys_V: Tensor, threshold: float) -> None:
        self._library.drop_below(keys_V.data_ptr(), len(keys_V), threshold, logits_V.data_ptr())

    def nucleus_threshold(self, probabilities_V: Tensor, p: float) -> float | None:
        address = self._threshold.data_ptr()
        is_found = self._library.nucleus(probabilities_V.data_ptr(), len(probabilities_V), p, address)
        return float(self._threshold) if is_found else None
