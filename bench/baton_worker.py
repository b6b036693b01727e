"""Measures Baton in a process of its own: the engine that a worker runs, without network. Driven by bench/engine.py."""

from __future__ import annotations

import argparse
import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from json_worker import serve
from workloads import MAX_LEN, SHORT_POOL_TOKENS

from cluster.sim.measuring.skipping import SkippingRunner
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.grammar.vocabulary import GrammarVocabulary
from workers.machine import native_build
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.loading import ServedModel
from workers.request import Request, SamplingParams
from workers.runner import Batch, LayerHook, Runner, Sampled
from workers.status import ModelInfo
from workers.text.output import Detokenizer
from workers.worker import make_engine


class TimedRunner(SkippingRunner):
    """Another runner, and the seconds spent in it."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self.spent_s = 0.0

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        if self.is_skipping:
            return super().execute(batch, on_layer)
        started = time.perf_counter()
        try:
            return super().execute(batch, on_layer)
        finally:
            self.spent_s += time.perf_counter() - started


class TimedModel:
    """A loaded model whose runner is timed (workers.worker.LoadedModel)."""

    def __init__(self, checkpoint: ServedModel) -> None:
        self._checkpoint = checkpoint
        self.runner: Any = TimedRunner(checkpoint.runner)

    @property
    def info(self) -> ModelInfo:
        return self._checkpoint.info

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._checkpoint.eos_token_ids

    @property
    def vocabulary(self) -> GrammarVocabulary | None:
        return self._checkpoint.vocabulary

    def make_detokenizer(self, request: Request) -> Detokenizer:
        return self._checkpoint.make_detokenizer(request)


class KernelNames(logging.Handler):
    """Keeps what a load says of the kernels that it chose."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("computing"):
            self.said.append(record.getMessage())


class BatonEngine:
    """Implements json_worker.MeasuredEngine; no prefix cache, so that no prompt is cheaper for having been seen.

    `settings` are further fields of WorkerConfig.
    """

    def __init__(self, path: str, dtype: str, num_threads: int, pool_tokens: int, settings: dict[str, Any]) -> None:
        config = WorkerConfig(
            model=path,
            dtype=dtype,
            num_threads=num_threads,
            max_model_len=min(MAX_LEN, pool_tokens),
            kv_memory_bytes=pool_tokens * _kv_bytes_per_token(path, dtype),
            prefix_cache=False,
            **settings,
        )
        self._names = KernelNames()
        product = logging.getLogger("workers")
        product.setLevel(logging.INFO)
        product.addHandler(self._names)
        self._model = TimedModel(ServedModel.load(config))
        product.removeHandler(self._names)
        self._engine: Engine = make_engine(config, self._model)
        self._next_id = 0

    @property
    def vocab_size(self) -> int:
        return self._model.info.vocab_size

    @property
    def runner(self) -> Any:
        return self._model.runner

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

    def describe(self) -> str:
        said = self._names.said or ["it did not say with which kernels"]
        return "; ".join((*said, *library_origins(Path("/proc/self/maps").read_text())))

    def decode(self, prompts: list[list[int]], num_steps: int, is_filled: bool) -> dict[str, Any]:
        """Also `overhead`: the share of step time outside the runner (scheduling, blocks, detokenizing, outputs)."""
        with self.decoding(prompts, num_steps, is_filled) as step:
            self._model.runner.spent_s = 0.0
            step_s = []
            for _ in range(num_steps):
                started = time.perf_counter()
                step()
                step_s.append(time.perf_counter() - started)
        return {"step_s": step_s, "overhead": 1 - self._model.runner.spent_s / sum(step_s)}

    @contextmanager
    def decoding(self, prompts: list[list[int]], num_steps: int, is_filled: bool) -> Iterator[Callable[[], object]]:
        """What makes one step in which every prompt gets a token; it may be called `num_steps` times."""
        self._model.runner.is_skipping = is_filled
        # prompts are computed one after another, so the first ones have drawn tokens before the last one starts
        num_tokens = num_steps + 2 * len(prompts) + sum(map(len, prompts)) // 512 + 64
        waiting = {self._add(prompt, num_tokens) for prompt in prompts}
        ids = tuple(waiting)
        while waiting:
            waiting -= {sequence_id for sequence_id, _ in self._engine.step().outputs}
        self._model.runner.is_skipping = False
        yield self._engine.step
        for sequence_id in ids:
            self._engine.cancel(sequence_id)

    def _add(self, prompt: list[int], num_tokens: int) -> int:
        self._next_id += 1
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, seed=0)
        self._engine.add(self._next_id, Request(str(self._next_id), tuple(prompt), params))
        return self._next_id


def _kv_bytes_per_token(path: str, dtype: str) -> int:
    config = ErnieConfig.load(Path(path))
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * (4 if dtype == "float32" else 2)


def library_origins(maps: str) -> list[str]:
    """Whether each library of C++ kernels in a process's memory map lies in the package or was compiled on this machine."""
    paths = {line.split()[-1] for line in maps.splitlines() if line.endswith(".so")}
    folder = str(Path(native_build.__file__).parents[1]) + "/"
    return [
        f"{path.rsplit('/', 1)[1].split('-')[0]} {'built ahead' if path.startswith(folder) else 'compiled at first use'}"
        for path in sorted(paths)
        if "kernels" in path.rsplit("/", 1)[1]
    ]


def known_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Those that say something. Raises SystemExit for one that this checkout's WorkerConfig does not have."""
    given = {name: value for name, value in values.items() if value}
    unknown = set(given) - {field.name for field in fields(WorkerConfig)}
    if unknown:
        raise SystemExit(f"this checkout has no worker setting {', '.join(sorted(unknown))}")
    return given


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return "commit " + subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool-tokens", type=int, default=SHORT_POOL_TOKENS)
    parser.add_argument("--instruction-set", default="", help="worker.instruction_set")
    parser.add_argument("--cache-folder", default="", help="worker.cache_folder")
    options = parser.parse_args()
    settings = known_settings({"instruction_set": options.instruction_set, "cache_folder": options.cache_folder})
    serve(_commit(), lambda path, dtype, threads: BatonEngine(path, dtype, threads, options.pool_tokens, settings))


if __name__ == "__main__":
    main()
