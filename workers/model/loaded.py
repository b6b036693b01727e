"""A checkpoint folder loaded and ready to run: a runner and the tokenizer behind one face."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from workers.config import WorkerConfig
from workers.model.loading import load_runner
from workers.request import Request
from workers.runner import Runner
from workers.status import ModelInfo
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer

PROMPT_TAIL = 16
"""Prompt tokens that a detokenizer sees, so that the first output token joins on as it should."""


class LoadedRunner(Runner, Protocol):
    """A runner that knows what it serves: of one process, or the leader's of a group."""

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class Checkpoint:
    """Implements workers.worker.LoadedModel for a "-PT" folder."""

    def __init__(self, runner: LoadedRunner, tokenizer: Tokenizer, served_name: str) -> None:
        self._runner = runner
        self.tokenizer = tokenizer
        self._info = replace(runner.model_info, name=served_name)

    @classmethod
    def load(cls, config: WorkerConfig) -> Checkpoint:
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
