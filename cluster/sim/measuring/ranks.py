"""A loaded model to be measured: in this process, or, when worker.parallel asks for it, a group whose other ranks are processes of this machine."""

from __future__ import annotations

import multiprocessing
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.sim.measuring.skipping import SkippingRunner
from workers.config import WorkerConfig
from workers.errors import BatonError
from workers.model.loading import ServedModel
from workers.text.tokenizer import Tokenizer

FORM_TIMEOUT_S = 300.0


@contextmanager
def loaded(config: WorkerConfig) -> Iterator[tuple[ServedModel, SkippingRunner]]:
    """Raises InvalidConfig when the model cannot be served, BatonError when a group does not form."""
    if config.parallel.size == 1:
        checkpoint = ServedModel.load(config)
        runner = SkippingRunner(checkpoint.runner, fills=config.device == "cpu")
        yield _around(checkpoint, config, runner), runner
        return
    from workers.group.runner import GroupRunner

    context, token = multiprocessing.get_context("spawn"), secrets.token_hex(16)
    processes = []

    def start(address: tuple[str, int]) -> None:
        for rank in range(1, config.parallel.size):
            process = context.Process(target=serve_rank, args=(config, rank, token, address), daemon=True)
            process.start()
            processes.append(process)

    group = GroupRunner.load(config, token=token, on_listening=start, on_lost=lambda rank, reason: None)
    try:
        if not group.wait_serving(FORM_TIMEOUT_S):
            raise BatonError(f"the {config.parallel.size} ranks did not form a group within {FORM_TIMEOUT_S:.0f} s")
        runner = SkippingRunner(group, fills=False)
        checkpoint = ServedModel(group, Tokenizer.load(config.model), Path(config.model).resolve().name)
        yield _around(checkpoint, config, runner), runner
    finally:
        group.stop()
        for process in processes:
            process.join(20)


def serve_rank(config: WorkerConfig, rank: int, token: str, address: tuple[str, int]) -> None:
    """A rank's process."""
    from workers.group.follower import Follower

    Follower(config, rank, token).serve(*address)


def _around(checkpoint: ServedModel, config: WorkerConfig, runner: SkippingRunner) -> ServedModel:
    """The same checkpoint with the runner that can skip."""
    name = config.served_model_name or Path(config.model).resolve().name
    return ServedModel(runner, checkpoint.tokenizer, name)
