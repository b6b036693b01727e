"""Random ERNIE 4.5 checkpoints, written by transformers, and short ways to run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
)

from workers.config import WorkerConfig
from workers.model.cpu.runner import TorchRunner
from workers.request import SamplingParams
from workers.runner import BLOCK_SIZE, Batch, SampleSpec, SequenceSlice

SHIPPED = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Oracle:
    """A checkpoint folder and the transformers model that wrote it."""

    folder: Path
    model: Any

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([token_ids])).logits[0]
        return logits

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        tokens: list[int] = []
        with torch.inference_mode():
            step = self.model(torch.tensor([prompt]), use_cache=True)
            for _ in range(num_tokens):
                tokens.append(int(step.logits[0, -1].argmax()))
                step = self.model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
        return tokens


def dense_like_0_3b(folder: Path, **changes: Any) -> Oracle:
    """Width, heads and head_dim (which is not hidden/heads) of ERNIE-4.5-0.3B; fewer layers, a small vocabulary."""
    fields = dict(
        vocab_size=600, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return _save(Ernie4_5ForCausalLM(Ernie4_5Config(**{**fields, **changes})), folder)


def small_dense(folder: Path, **changes: Any) -> Oracle:
    fields = dict(hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    return dense_like_0_3b(folder, **{**fields, **changes})


def moe_with_shared_experts(folder: Path, **changes: Any) -> Oracle:
    """Heads, experts and range of MoE layers that no shipped model has; both dense layers before and after."""
    fields = dict(
        vocab_size=500, hidden_size=96, intermediate_size=160, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=1024, moe_num_experts=5, moe_k=3,
        moe_num_shared_experts=2, moe_intermediate_size=56, moe_layer_start_index=1, moe_layer_end_index=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    return _save(Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**fields, **changes})), folder)


def moe_without_shared_experts(folder: Path, **changes: Any) -> Oracle:
    """No shared experts, its own head, every other layer a mixture, one key-value head."""
    fields = dict(
        moe_num_shared_experts=0, moe_layer_interval=2, moe_layer_start_index=0, moe_layer_end_index=-1,
        num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=4, moe_num_experts=12, moe_k=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return moe_with_shared_experts(folder, **{**fields, **changes})


def load(
    folder: Path, dtype: str = "float32", num_blocks: int = 64, max_model_len: int = 1024, **changes: Any
) -> TorchRunner:
    """A runner with room for about `num_blocks` blocks."""
    probe = WorkerConfig(model=str(folder), dtype=dtype, max_model_len=BLOCK_SIZE, **changes)
    block_bytes = TorchRunner.load(probe).kv_memory.layout.block_bytes
    return TorchRunner.load(
        WorkerConfig(
            model=str(folder),
            dtype=dtype,
            max_model_len=max_model_len,
            kv_memory_bytes=num_blocks * block_bytes,
            **changes,
        )
    )


def prefill(tokens: Sequence[int], start: int = 0, table: Sequence[int] = range(16), **fields: Any) -> SequenceSlice:
    """The slice of `tokens` from position `start` on."""
    return SequenceSlice(0, tokens[start:], start, table, **fields)


def decode(token: int, position: int, table: Sequence[int] = range(16), **fields: Any) -> SequenceSlice:
    return SequenceSlice(0, (token,), position, table, **fields)


def logits(runner: TorchRunner, *pieces: SequenceSlice, decode: Sequence[SequenceSlice] = ()) -> Tensor:
    """Logits of all rows of one step."""
    with torch.inference_mode():
        return runner.model.logits(runner.hidden_states(Batch(pieces, tuple(decode))))


def greedy(runner: TorchRunner, prompt: Sequence[int], num_tokens: int, table: Sequence[int] = range(16)) -> list[int]:
    """Prompt in one prefill slice, then `num_tokens` through the decode path."""
    spec = SampleSpec(GREEDY, 0, 0, prompt, ())
    tokens = [_only_token(runner, Batch(prefill=(prefill(prompt, table=table, sample=spec),)))]
    while len(tokens) < num_tokens:
        piece = decode(tokens[-1], len(prompt) + len(tokens) - 1, table, sample=spec)
        tokens.append(_only_token(runner, Batch(decode=(piece,))))
    return tokens


def random_tokens(count: int, seed: int = 0, vocab_size: int = 500) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(5, vocab_size, (count,), generator=generator).tolist()
    return tokens


def _only_token(runner: TorchRunner, batch: Batch) -> int:
    token = runner.execute(batch)[0].token_id
    assert token is not None
    return token


def _save(model: Any, folder: Path) -> Oracle:
    """Random weights under which layers matter: a small embedding, so that tied logits do not just repeat the input."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in sorted([*model.named_parameters(), *model.named_buffers()]):
            if "e_score_correction_bias" in name:
                weight.normal_(0, 0.05, generator=generator)
            elif weight.dim() >= 2:
                std = 0.05 if "embed" in name or "lm_head" in name else weight.shape[-1] ** -0.5
                weight.normal_(0, std, generator=generator)
            elif "norm" in name:
                weight.normal_(1, 0.1, generator=generator)
    model.save_pretrained(folder)
    return Oracle(folder, model.eval())
