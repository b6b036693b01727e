"""Loads a checkpoint folder, ready to run, by the device that a worker is configured for: a whole model with its tokenizer, or the ranks of a group; knows no weights."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.grammar.language import engine_name
from workers.grammar.vocabulary import GrammarVocabulary
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import checkpoint_folder
from workers.model.cpu.rank_runner import load_rank, rank_layout
from workers.model.cpu.runner import TorchRunner
from workers.model.decoder.model_runner import ModelRunner, served_len
from workers.model.decoder.rank import Rank
from workers.model.parallel.collectives import Links
from workers.model.parallel.expert_placement import Placement
from workers.model.parallel.layout import Layout
from workers.request import Request
from workers.runner import Runner
from workers.status import ModelInfo
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer


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


PROMPT_TAIL = 16
"""Prompt tokens that a detokenizer sees, so that the first output token joins on as it should."""


class LoadedRunner(Runner, Protocol):
    """A runner that knows what it serves: of one process, or the leader's of a group."""

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class ServedModel:
    """Implements workers.worker.LoadedModel for a "-PT" folder."""

    def __init__(self, runner: LoadedRunner, tokenizer: Tokenizer, served_name: str) -> None:
        self._runner = runner
        self.tokenizer = tokenizer
        self._info = replace(runner.model_info, name=served_name)
        self.vocabulary = (
            GrammarVocabulary(tokenizer, runner.vocab_size, runner.eos_token_ids) if engine_name() else None
        )

    @classmethod
    def load(cls, config: WorkerConfig) -> ServedModel:
        """Raises InvalidConfig with one sentence when the folder cannot be served."""
        tokenizer = Tokenizer.load(config.model)
        runner = load_runner(config)
        return cls(runner, tokenizer, config.served_model_name or Path(config.model).resolve().name)

    @property
    def runner(self) -> Runner:
        return self._runner

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._runner.eos_token_ids

    def make_detokenizer(self, request: Request) -> IncrementalDetokenizer:
        tail = request.prompt_token_ids[-PROMPT_TAIL:]
        return IncrementalDetokenizer(self.tokenizer, tail, request.params.skip_special_tokens)


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
