"""The two engines that bench/engine_cuda.py measures, with random weights made on the device: CudaRunner and transformers.

Both offer decode(batch, context, steps) and prefill(num_tokens), which return seconds for one step or one prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.cuda.device_pool import DevicePool
from workers.model.cuda.ernie import CudaErnie
from workers.model.cuda.runner import CudaRunner, as_current
from workers.model.decoder.kv_tensors import kv_layout
from workers.request import SamplingParams
from workers.runner import BLOCK_SIZE, Batch, SampleSpec, SequenceSlice
from workers.status import ModelInfo

_GREEDY = SampleSpec(SamplingParams(temperature=0), 0, 0, (), ())
_WARM_UP_STEPS = 3


class RandomWeights:
    """A workers.model.cuda.ernie.WeightSource without a file: normal values, so that routers choose about evenly."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        weight = torch.empty(shape, dtype=dtype, device=self._device)
        if "norm" in name:
            return weight.fill_(1)
        return weight.normal_(0, 0 if "bias" in name else shape[-1] ** -0.5)

    def require_all_taken(self, unused: tuple[str, ...] = ()) -> None:
        pass


class Baton:
    """CudaRunner with a pool of `num_blocks`, filled with noise."""

    def __init__(
        self,
        config: ErnieConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        deterministic: bool,
        max_len: int,
        max_batch: int,
        num_blocks: int,
    ) -> None:
        self._device = device
        self._vocab_size = config.vocab_size
        with torch.inference_mode(), as_current(device):
            model = CudaErnie(config, RandomWeights(device), dtype, max_len, device, deterministic)
            pool = DevicePool(kv_layout(config, dtype, num_blocks), device)
            for block in pool.values:
                block.normal_()
            info = ModelInfo("random", "", config.vocab_size, max_len, BLOCK_SIZE)
            self._runner = CudaRunner(model, pool, info, device=device, dtype=dtype, max_num_seqs=max_batch)
            self.warnings = self._runner.warm_up()

    def decode(self, batch: int, context: int, steps: int) -> float:
        per_sequence = -(-(context + _WARM_UP_STEPS + steps) // BLOCK_SIZE)
        tables = [range(i * per_sequence, (i + 1) * per_sequence) for i in range(batch)]

        def step(index: int) -> None:
            slices = [SequenceSlice(i, (i + 5,), context + index, t, sample=_GREEDY) for i, t in enumerate(tables)]
            self._runner.execute(Batch(decode=tuple(slices)))

        return _seconds(step, steps, self._device)

    def prefill(self, num_tokens: int) -> float:
        tokens = [(7 * i) % self._vocab_size for i in range(num_tokens)]
        table = range(-(-num_tokens // BLOCK_SIZE))
        piece = SequenceSlice(0, tokens, 0, table, sample=_GREEDY)
        return _seconds(lambda _: self._runner.execute(Batch(prefill=(piece,))), 3, self._device)


class Transformers:
    """The reference implementation, with its dynamic cache filled with noise."""

    def __init__(self, config: ErnieConfig, device: torch.device, dtype: torch.dtype, max_len: int) -> None:
        from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

        moe = config.moe
        assert moe is not None
        self._config, self._device, self._dtype = config, device, dtype
        settings = Ernie4_5_MoeConfig(  # type: ignore[call-arg]
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, max_position_embeddings=max_len,
            moe_num_experts=moe.num_experts, moe_k=moe.num_experts_per_token,
            moe_num_shared_experts=moe.num_shared_experts, moe_intermediate_size=moe.intermediate_size,
            moe_layer_start_index=moe.first_layer, moe_layer_end_index=moe.last_layer, tie_word_embeddings=True,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self._model: Any = Ernie4_5_MoeForCausalLM(settings).eval()
        finally:
            torch.set_default_dtype(before)

    def decode(self, batch: int, context: int, steps: int) -> float:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        shape = (batch, self._config.num_kv_heads, context, self._config.head_dim)
        for layer in range(self._config.num_layers):
            keys, values = (torch.randn(shape, dtype=self._dtype, device=self._device) for _ in range(2))
            cache.update(keys, values, layer)
        tokens = torch.full((batch, 1), 5, device=self._device)

        def step(_: int) -> None:
            logits = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            logits[:, -1].argmax(-1).tolist()

        with torch.inference_mode():
            return _seconds(step, steps, self._device)

    def prefill(self, num_tokens: int) -> float:
        tokens = (torch.arange(num_tokens, device=self._device) * 7 % self._config.vocab_size)[None]

        def run(_: int) -> None:
            self._model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()

        with torch.inference_mode():
            return _seconds(run, 3, self._device)


def memory_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """What a large copy reaches, reads and writes together."""
    source = torch.ones(num_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda _: target.copy_(source), 5, device)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    x = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda _: x @ x, 5, device)


def _seconds(step: Callable[[int], object], count: int, device: torch.device) -> float:
    """Mean wall time of a step after a few that are not counted; `step` gets its number."""
    for index in range(_WARM_UP_STEPS):
        step(index)
    _synchronize(device)
    started = time.perf_counter()
    for index in range(count):
        step(_WARM_UP_STEPS + index)
    _synchronize(device)
    return (time.perf_counter() - started) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
