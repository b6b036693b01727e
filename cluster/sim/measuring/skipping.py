"""A runner that can leave its work out, so that a long context is in place without having been computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from workers.runner import Batch, LayerHook, Runner, Sampled

_NOISE_STEP = 8209
"""Elements by which the noise of two neighbouring blocks is shifted."""


class SkippingRunner:
    """Another runner. While it `is_skipping` it computes nothing: the blocks of a slice get noise, and its last token is drawn.

    What a step costs does not depend on what keys and values say; pages that were never written would be cheaper to read.
    """

    def __init__(self, runner: Runner, fills: bool = True) -> None:
        self._runner = runner
        self.is_skipping = False
        self._filled: set[int] | None = set() if fills else None
        layout = runner.kv_memory.layout
        values = np.random.default_rng(0).standard_normal(2 * layout.block_bytes // layout.itemsize, dtype=np.float32)
        # The upper half of an fp32 value is a bf16 value.
        noise = values if layout.itemsize == 4 else values.view(np.uint16)[1::2].copy()
        self._noise = noise.view(np.uint8)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        if not self.is_skipping:
            return self._runner.execute(batch, on_layer) if on_layer is not None else self._runner.execute(batch)
        slices = (*batch.prefill, *batch.decode)
        if self._filled is not None:
            for block in {int(block) for piece in slices for block in piece.block_table} - self._filled:
                self._fill(block)
                self._filled.add(block)
        return [Sampled(piece.sequence_id, None if piece.sample is None else piece.token_ids[-1]) for piece in slices]

    def _fill(self, block: int) -> None:
        layout = self._runner.kv_memory.layout
        first = block * _NOISE_STEP * layout.itemsize % layout.block_bytes
        place = block * layout.block_bytes
        self._runner.kv_memory.bytes[place : place + layout.block_bytes] = self._noise[
            first : first + layout.block_bytes
        ]
