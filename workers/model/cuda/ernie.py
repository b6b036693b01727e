"""The ERNIE 4.5 decoder on a CUDA device: the forward pass of workers.model.ernie in fused kernels.

Rows that prefill and rows that decode never share a pass: each kind has its own tiles, so that a row's bits do not
depend on its company. Shapes: T rows, D hidden, H query heads, K key-value heads, C channels of a head, V vocabulary, E
experts, F expert width, R rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.model.cuda.device_pool import DevicePool, OnFilled
from workers.model.cuda.flash import find_flash_attention
from workers.model.cuda.kernels.decode_attention import decode_attention
from workers.model.cuda.kernels.prefill_attention import prefill_attention
from workers.model.cuda.kernels.rows import add_norm, rotate_and_store
from workers.model.cuda.layers import Experts, FeedForward, Linear, MixtureOfExperts
from workers.model.cuda.step_inputs import StepInputs
from workers.model.ernie_config import ErnieConfig, MoeConfig
from workers.model.rope import RotaryEmbedding

_SPLITS, _MIN_SPLIT_BLOCKS = 16, 4
"""Decode attention cuts each sequence into at most 16 runs of at least 256 positions, in deterministic mode."""
_MOST_SPLITS, _LEAST_SPLIT_BLOCKS = 32, 2
"""Bounds of what is chosen by the number of rows otherwise."""


class WeightSource(Protocol):
    """What workers.model.weights.Checkpoint offers."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def require_all_taken(self, unused: tuple[str, ...] = ()) -> None: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    input_norm_D: Tensor
    qkv: Linear
    output: Linear
    post_attention_norm_D: Tensor
    mlp: FeedForward | MixtureOfExperts


class CudaErnie:
    """A text model with its weights in `dtype` on `device`."""

    def __init__(
        self,
        config: ErnieConfig,
        source: WeightSource,
        dtype: torch.dtype,
        max_len: int,
        device: torch.device,
        deterministic: bool,
    ) -> None:
        """Takes every weight of the source in turn. Raises InvalidConfig when one is missing, misshapen or unknown."""
        self.config = config
        self._deterministic = deterministic
        self._flash = None if deterministic else find_flash_attention(device, dtype)
        is_cuda = device.type == "cuda"
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1
        rope = RotaryEmbedding(config.head_dim, config.rope_theta, max_len)
        cos, sin = rope.at(torch.arange(max_len))
        self._rotation = (cos.squeeze(1).to(device), sin.squeeze(1).to(device))
        V, D = config.vocab_size, config.hidden_size
        tied = config.tie_word_embeddings
        self._embedding_VD = source.take("model.embed_tokens.weight", (V, D), dtype).to(device)
        loader = _Loader(config, source, dtype, device, deterministic)
        self._layers = tuple(loader.layer(index) for index in range(config.num_layers))
        self._norm_D = source.take("model.norm.weight", (D,), dtype).to(device)
        head_VD = self._embedding_VD if tied else source.take("lm_head.weight", (V, D), dtype).to(device)
        self._head = Linear(head_VD, deterministic)
        source.require_all_taken(unused=("lm_head.weight",) if tied else ())

    def forward(self, inputs: StepInputs, pool: DevicePool, on_filled: OnFilled | None = None) -> Tensor:
        """Hidden states [T, D] after the last layer; keys and values of all rows are in the pool afterwards.

        `on_filled(n)` is called after the launch of the kernels that write those of the first n layers.
        """
        is_decode, eps = inputs.prefill is None, self.config.rms_norm_eps
        x_TD = self._embedding_VD.index_select(0, inputs.rows[:, 0])
        y_TD: Tensor | None = None
        for index, layer in enumerate(self._layers):
            layer_pool = pool.layer(index)
            x_TD, normed_TD = add_norm(x_TD, y_TD, layer.input_norm_D, eps)
            qkv_TX = layer.qkv(normed_TD, is_decode)
            q_THC = rotate_and_store(qkv_TX, self._rotation, inputs.rows, layer_pool, self.config.num_heads)
            if on_filled is not None:
                on_filled(index + 1)
            y_TD = layer.output(self._attend(q_THC, layer_pool, inputs), is_decode)
            x_TD, normed_TD = add_norm(x_TD, y_TD, layer.post_attention_norm_D, eps)
            y_TD = layer.mlp(normed_TD, is_decode)
        assert y_TD is not None
        return x_TD + y_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of hidden states."""
        _, normed_RD = add_norm(x_RD.contiguous(), None, self._norm_D, self.config.rms_norm_eps)
        return self._head(normed_RD, is_decode=True).float()

    def greedy(self, x_RD: Tensor) -> list[int]:
        """The most likely token of each row; of equals the lowest id."""
        tokens: list[int] = self.logits(x_RD).argmax(-1).tolist()
        return tokens

    def _attend(self, q_THC: Tensor, layer_pool: Tensor, inputs: StepInputs) -> Tensor:
        if inputs.prefill is None:
            return decode_attention(q_THC, layer_pool, inputs.rows, *self._splits(q_THC.shape[0]))
        if self._flash is not None:
            return self._flash(q_THC, layer_pool, inputs.prefill)
        return prefill_attention(q_THC, layer_pool, inputs.prefill.tiles, inputs.prefill.tables)

    def _splits(self, num_rows: int) -> tuple[int, int]:
        """How many runs a sequence is cut into at most, and their least length in blocks."""
        if self._deterministic:
            return _SPLITS, _MIN_SPLIT_BLOCKS
        wanted = 2 * self._num_processors // (num_rows * self.config.num_kv_heads)
        return min(max(wanted, 1), _MOST_SPLITS), _LEAST_SPLIT_BLOCKS


@dataclass(frozen=True, slots=True)
class _Loader:
    config: ErnieConfig
    source: WeightSource
    dtype: torch.dtype
    device: torch.device
    deterministic: bool

    def layer(self, index: int) -> Layer:
        def take(name: str, *shape: int, exact: bool = False) -> Tensor:
            kind = torch.float32 if exact else self.dtype
            return self.source.take(f"model.layers.{index}.{name}", shape, kind).to(self.device)

        config = self.config
        D, C = config.hidden_size, config.head_dim
        H, K = config.num_heads * C, config.num_kv_heads * C
        moe = config.moe if config.moe is not None and config.moe.has_layer(index) else None
        parts = [take(f"self_attn.{part}_proj.weight", rows, D) for part, rows in (("q", H), ("k", K), ("v", K))]
        return Layer(
            input_norm_D=take("input_layernorm.weight", D),
            qkv=Linear(torch.cat(parts), self.deterministic),
            output=Linear(take("self_attn.o_proj.weight", D, H), self.deterministic),
            post_attention_norm_D=take("post_attention_layernorm.weight", D),
            mlp=self._feed_forward(take, "mlp", config.intermediate_size) if moe is None else self._moe(take, moe),
        )

    def _feed_forward(self, take: Callable[..., Tensor], prefix: str, width: int) -> FeedForward:
        D = self.config.hidden_size
        gate_up = torch.cat([take(f"{prefix}.{part}_proj.weight", width, D) for part in ("gate", "up")])
        return FeedForward(gate_up, take(f"{prefix}.down_proj.weight", D, width), self.deterministic)

    def _moe(self, take: Callable[..., Tensor], moe: MoeConfig) -> MixtureOfExperts:
        D, E, F = self.config.hidden_size, moe.num_experts, moe.intermediate_size
        gate_up_EXD = torch.empty(E, 2 * F, D, dtype=self.dtype, device=self.device)
        down_EDF = torch.empty(E, D, F, dtype=self.dtype, device=self.device)
        for expert in range(E):
            gate_up_EXD[expert, :F] = take(f"mlp.experts.{expert}.gate_proj.weight", F, D)
            gate_up_EXD[expert, F:] = take(f"mlp.experts.{expert}.up_proj.weight", F, D)
            down_EDF[expert] = take(f"mlp.experts.{expert}.down_proj.weight", D, F)
        return MixtureOfExperts(
            Linear(take("mlp.gate.weight", E, D, exact=True), self.deterministic),
            take("mlp.moe_statics.e_score_correction_bias", 1, E, exact=True)[0],
            moe.num_experts_per_token,
            moe.norm_min,
            Experts(gate_up_EXD, down_EDF, self.deterministic),
            self._feed_forward(take, "mlp.shared_experts", F * moe.num_shared_experts)
            if moe.num_shared_experts
            else None,
        )
