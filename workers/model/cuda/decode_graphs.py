"""Decode steps as recorded CUDA graphs: one for each number of rows in a list, replayed with new inputs in place.

A low batch spends longer on launching its hundreds of kernels than on running them; a graph launches them at once. What
has no graph (no memory was left for one, more rows than the largest, no CUDA) runs the same kernels one by one.
Shapes: N rows, D hidden, W columns of step inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.model.cuda.step_inputs import ROW_COLUMNS, LateTokens, StepInputs, Upload, fill_decode_rows
from workers.runner import SequenceSlice

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, *range(48, 257, 16))


def bucket_for(num_rows: int) -> int:
    """Rows to compute for `num_rows`: the next number of the list, or beyond it the next multiple of 64."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), -(-num_rows // 64) * 64)


class DecodeGraphs:
    """Runs decode slices through `forward`, padded to a bucket; padding rows use `scratch_block`."""

    def __init__(
        self,
        forward: Callable[[StepInputs], Tensor],
        *,
        hidden_size: int,
        dtype: torch.dtype,
        max_rows: int,
        max_blocks: int,
        scratch_block: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._device = device
        self._scratch_block = scratch_block
        self._max_rows = bucket_for(max_rows)
        self._rows = torch.zeros(self._max_rows, ROW_COLUMNS + max_blocks, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(self._max_rows, hidden_size, dtype=dtype, device=device)
        self._upload = Upload(device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def recorded(self) -> tuple[int, ...]:
        """Numbers of rows that have a graph."""
        return tuple(self._graphs)

    def run(self, slices: Sequence[SequenceSlice], late: LateTokens | None = None) -> Tensor:
        """Hidden states [N, D], valid until the next run. More slices than `max_rows` run in several passes.

        `late` has the tokens of slices that are late.
        """
        if len(slices) > self._max_rows:
            parts = [slices[i : i + self._max_rows] for i in range(0, len(slices), self._max_rows)]
            return torch.cat([self.run(part, late).clone() for part in parts])
        bucket = bucket_for(len(slices))
        self._fill(slices, bucket)
        if late is not None:
            late.fill(self._rows[:bucket], slices)
        graph = self._graphs.get(bucket)
        if graph is None:
            self._compute(bucket)
        else:
            graph.replay()
        return self._hidden[: len(slices)]

    def record(self, max_bytes: int) -> tuple[str, ...]:
        """Records a graph for each bucket, small ones first, until they hold `max_bytes` of device memory; warnings."""
        if self._device.type != "cuda":
            return ()
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        free_bytes = torch.cuda.mem_get_info(self._device)[0]
        for bucket in (b for b in BUCKETS if b <= self._max_rows):
            torch.cuda.empty_cache()
            used_bytes = free_bytes - torch.cuda.mem_get_info(self._device)[0]
            if used_bytes > max_bytes:
                warning = (
                    f"CUDA graphs hold {used_bytes / 2**20:.0f} MiB, above their bound of {max_bytes / 2**20:.0f} MiB; "
                    f"decode steps of {bucket} and more sequences launch their kernels one by one"
                )
                logger.warning(warning)
                return (warning,)
            self._fill((), bucket)
            self._compute(bucket)  # compiles kernels and lets libraries allocate: not allowed while a graph is recorded
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._compute(bucket)
            self._graphs[bucket] = graph
        return ()

    def _fill(self, slices: Sequence[SequenceSlice], bucket: int) -> None:
        num_columns = self._rows.shape[1]
        host = self._upload.array(bucket * num_columns).reshape(bucket, num_columns)
        fill_decode_rows(host, slices, self._scratch_block)
        self._upload.send(self._rows[:bucket])

    def _compute(self, bucket: int) -> None:
        self._hidden[:bucket].copy_(self._forward(StepInputs(self._rows[:bucket])))
