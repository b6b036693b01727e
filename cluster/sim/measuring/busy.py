"""Other processes that compute the same model's steps meanwhile, as the other workers of a machine would."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster.sim.measuring.ranks import loaded
from cluster.sim.measuring.steps import StepKind, StepMeter
from workers.config import WorkerConfig
from workers.errors import BatonError

READY_TIMEOUT_S = 300.0


@contextmanager
def busy_neighbours(config: WorkerConfig, count: int) -> Iterator[None]:
    """`count` of them compute until the end of the block. Raises BatonError when one does not begin."""
    context = multiprocessing.get_context("spawn")
    begun = [context.Event() for _ in range(count)]
    alone = replace(config, port=0, kv_disk_folder="")
    processes = [context.Process(target=_compute, args=(alone, event), daemon=True) for event in begun]
    try:
        for process in processes:
            process.start()
        for event in begun:
            if not event.wait(READY_TIMEOUT_S):
                raise BatonError(f"a process that should compute beside did not begin within {READY_TIMEOUT_S:.0f} s")
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join(20)


def _compute(config: WorkerConfig, begun: Any) -> None:
    """Prompts and decodes in turn, until the process is ended."""
    with loaded(config) as (checkpoint, runner):
        meter = StepMeter(config, checkpoint, runner, seed=1)
        chunk = min(256, config.max_batch_tokens)
        kinds = (StepKind(num_decodes=min(8, config.max_num_seqs), decode_context=512), StepKind(prefill_tokens=chunk))
        while True:
            for kind in kinds:
                meter.measure(kind)
                begun.set()
