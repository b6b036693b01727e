"""Measures Baton in a process of its own: the engine that a worker runs, without network. Driven by bench/engine.py."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from json_worker import serve

from workers.config import WorkerConfig
from workers.engine import Engine
from workers.loaded import Checkpoint
from workers.model.ernie_config import ErnieConfig
from workers.request import Request, SamplingParams
from workers.runner import Batch, LayerHook, Runner, Sampled
from workers.sampling.output import Detokenizer
from workers.status import ModelInfo
from workers.worker import make_engine

MAX_MODEL_LEN = 4096
POOL_TOKENS = 32 * 768
"""KV room: 32 sequences of 768 tokens."""


class TimedRunner:
    """Another runner, and the seconds spent in it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.spent_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        started = time.perf_counter()
        try:
            return self._runner.execute(batch, on_layer)
        finally:
            self.spent_s += time.perf_counter() - started


class TimedModel:
    """A loaded model whose runner is timed (workers.worker.LoadedModel)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.runner: Any = TimedRunner(checkpoint.runner)

    @property
    def info(self) -> ModelInfo:
        return self._checkpoint.info

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._checkpoint.eos_token_ids

    def make_detokenizer(self, request: Request) -> Detokenizer:
        return self._checkpoint.make_detokenizer(request)


class BatonEngine:
    """Implements json_worker.MeasuredEngine; no prefix cache, so that no prompt is cheaper for having been seen."""

    def __init__(self, path: str, dtype: str, num_threads: int) -> None:
        config = WorkerConfig(
            model=path,
            dtype=dtype,
            num_threads=num_threads,
            max_model_len=MAX_MODEL_LEN,
            kv_memory_bytes=POOL_TOKENS * _kv_bytes_per_token(path, dtype),
            prefix_cache=False,
        )
        self._model = TimedModel(Checkpoint.load(config))
        self._engine: Engine = make_engine(config, self._model)
        self._next_id = 0

    @property
    def vocab_size(self) -> int:
        return self._model.info.vocab_size

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        self._add(prompt, num_tokens)
        tokens: list[int] = []
        while self._engine.has_work:
            for _, output in self._engine.step().outputs:
                tokens += output.token_ids
        return tokens

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        self.greedy(prompt, 1)
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], num_steps: int) -> dict[str, Any]:
        """Also `overhead`: the share of step time outside the runner (scheduling, blocks, detokenizing, outputs)."""
        # prompts are computed one after another, so the first ones have drawn tokens before the last one starts
        waiting = {self._add(prompt, num_steps + 2 * len(prompts) + 64) for prompt in prompts}
        ids = tuple(waiting)
        while waiting:
            waiting -= {sequence_id for sequence_id, _ in self._engine.step().outputs}
        self._model.runner.spent_s = 0.0
        step_s = []
        for _ in range(num_steps):
            started = time.perf_counter()
            self._engine.step()
            step_s.append(time.perf_counter() - started)
        for sequence_id in ids:
            self._engine.cancel(sequence_id)
        return {"step_s": step_s, "overhead": 1 - self._model.runner.spent_s / sum(step_s)}

    def _add(self, prompt: list[int], num_tokens: int) -> int:
        self._next_id += 1
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, seed=0)
        self._engine.add(self._next_id, Request(str(self._next_id), tuple(prompt), params))
        return self._next_id


def _kv_bytes_per_token(path: str, dtype: str) -> int:
    config = ErnieConfig.load(Path(path))
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * (4 if dtype == "float32" else 2)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return "commit " + subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"


if __name__ == "__main__":
    serve(_commit(), BatonEngine)
