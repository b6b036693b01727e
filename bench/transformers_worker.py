"""Measures transformers in a process of its own, `generate` or, with --continuous, `generate_batch`. Driven by bench/engine.py."""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from typing import Any

import torch
import transformers
from json_worker import serve
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from workloads import SHORT_POOL_TOKENS

MAX_BATCH_TOKENS = 512


class StepClock(StoppingCriteria):
    """Notes when each step of `generate` ends; never stops it."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TransformersEngine:
    """Implements json_worker.MeasuredEngine with `generate`, eager, all prompts of one length in one batch."""

    def __init__(self, path: str, dtype: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self._model.generation_config.eos_token_id = None

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.vocab_size)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens: list[int] = self._generate([prompt], num_tokens)[0, len(prompt) :].tolist()
        return tokens

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        self._generate([prompt], 1)
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], num_steps: int, is_filled: bool) -> dict[str, Any]:
        clock = StepClock()
        cache = self._filled_cache(len(prompts), len(prompts[0]) - 1) if is_filled else None
        self._generate(prompts, num_steps + 1, clock, cache=cache)
        return {"step_s": _differences(clock.times_s)}

    def describe(self) -> str:
        return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"

    def _filled_cache(self, batch: int, num_tokens: int) -> DynamicCache:
        """Noise for all but the last token of each prompt, as `generate` takes what it has computed before."""
        config = self._model.config
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            size = (batch, config.num_key_value_heads, num_tokens, config.head_dim)
            keys, values = (torch.randn(size).to(self._model.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def _generate(
        self, prompts: list[list[int]], num_tokens: int, *clocks: StepClock, cache: DynamicCache | None = None
    ) -> torch.Tensor:
        ids = torch.tensor(prompts)
        filled = {} if cache is None else {"past_key_values": cache}
        with torch.inference_mode():
            found: torch.Tensor = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                stopping_criteria=StoppingCriteriaList(clocks),
                **filled,
            )
        return found


class ContinuousEngine(TransformersEngine):
    """The same model through the paged, continuously batching path."""

    def decode(self, prompts: list[list[int]], num_steps: int, is_filled: bool) -> dict[str, Any]:
        if is_filled:
            raise RuntimeError("generate_batch takes no cache from outside")
        # prompts are computed in turn: those that start first must not end before the last one has made its steps
        num_prefill_steps = sum(map(len, prompts)) // MAX_BATCH_TOKENS + 2
        num_tokens = num_steps + 1 + 2 * num_prefill_steps
        config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0)
        # left alone its cache takes most of the memory
        num_blocks = SHORT_POOL_TOKENS // ContinuousBatchingConfig().page_size
        limits = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=MAX_BATCH_TOKENS)
        results = self._model.generate_batch(prompts, config, limits, record_timestamps=True)
        times = [result.timestamps for result in results.values()]
        if len(times) < len(prompts) or not all(times):
            raise RuntimeError("generate_batch did not finish all prompts")
        last_to_start = max(times, key=lambda stamps: stamps[0])
        return {"step_s": _differences(last_to_start)[:num_steps]}


def _differences(times_s: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times_s)]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    serve(
        f"transformers {transformers.__version__}",
        ContinuousEngine if "--continuous" in sys.argv else TransformersEngine,
    )
