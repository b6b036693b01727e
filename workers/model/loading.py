"""Chooses the runner for the device that a worker is configured for; knows no weights."""

from __future__ import annotations

import importlib.util
from typing import Any

from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.model.cpu.runner import TorchRunner
from workers.model.decoder.model_runner import ModelRunner


def load_runner(config: WorkerConfig) -> ModelRunner[Any]:
    """The runner of config.model on config.device. Raises InvalidConfig when it cannot be served as configured."""
    if config.parallel.size > 1:
        raise InvalidConfig(
            f"worker.parallel spreads the model over {config.parallel.size} ranks: start a group (workers.group), not one worker"
        )
    if config.device == "cpu":
        return TorchRunner.load(config)
    if importlib.util.find_spec("triton") is None:
        raise InvalidConfig(f"worker.device {config.device!r} needs Triton: pip install 'baton-serve[cuda]'")
    from workers.model.cuda.runner import CudaRunner  # a machine without Triton serves on the CPU

    return CudaRunner.load(config)
