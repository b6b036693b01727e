"""Chooses how ranks of a group are loaded, by the device that the worker is configured for; knows no weights."""

from __future__ import annotations

import importlib.util
from typing import Protocol

from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import checkpoint_folder
from workers.model.cpu.rank_runner import Rank, load_rank, rank_layout
from workers.model.decoder.model_runner import served_len
from workers.model.parallel.collectives import Links
from workers.model.parallel.expert_placement import Placement
from workers.model.parallel.layout import Layout


class RankLoader(Protocol):
    """Loads ranks onto one kind of device."""

    def count_blocks(self, config: WorkerConfig) -> int:
        """KV blocks of each pool, by what this process has. Raises InvalidConfig when they hold not even one sequence."""

    def load(self, config: WorkerConfig, rank: int, links: Links, placement: Placement, num_blocks: int) -> Rank:
        """One rank's share of config.model. Raises InvalidConfig when the model cannot be cut so or does not fit."""


class CpuRanks:
    """Implements RankLoader on the CPU."""

    def count_blocks(self, config: WorkerConfig) -> int:
        dimensions = ErnieConfig.load(checkpoint_folder(config.model))
        layout = Layout.of(config.parallel, dimensions)
        return rank_layout(config, dimensions, layout, served_len(config, dimensions)).num_blocks

    def load(self, config: WorkerConfig, rank: int, links: Links, placement: Placement, num_blocks: int) -> Rank:
        return load_rank(config, rank, links, placement, num_blocks)


def rank_loader(config: WorkerConfig) -> RankLoader:
    """The loader for config.device. Raises InvalidConfig when this machine does not have it."""
    if config.device == "cpu":
        return CpuRanks()
    if importlib.util.find_spec("triton") is None:
        raise InvalidConfig(f"worker.device {config.device!r} needs Triton: pip install 'baton-serve[cuda]'")
    from workers.model.cuda.rank_runner import CudaRanks  # a machine without Triton serves on the CPU
    from workers.model.cuda.runner import find_device

    return CudaRanks(find_device(config))
