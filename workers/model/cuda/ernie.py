"""The ERNIE 4.5 decoder on a CUDA device: the forward pass of workers.model.decoder.ernie in fused kernels.

Rows that prefill and rows that decode never share a pass: each kind has its own tiles, so that a row's bits do not
depend on its company. Shapes: T rows, D hidden, H query heads, K key-value heads, C channels of a head, V vocabulary, E
experts, F expert width, R rows that are sampled.

FlashAttention 3 is not part of torch's wheel, runs on compute capability 9 only, and its tiles begin where a chunk begins, so with it the bits of a row
depend on how its prompt was cut.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.model.checkpoint.ernie_config import ErnieConfig, MoeConfig
from workers.model.cuda.device_pool import DevicePool, OnFilled
from workers.model.cuda.kernels.decode_attention import decode_attention
from workers.model.cuda.kernels.prefill_attention import prefill_attention
from workers.model.cuda.kernels.rows import add_norm, rotate_and_store
from workers.model.cuda.layers import Experts, FeedForward, Linear, MixtureOfExperts
from workers.model.cuda.step_inputs import PrefillInputs, StepInputs
from workers.model.decoder.layers import RotaryEmbedding

logger = logging.getLogger(__name__)

Attention = Callable[[Tensor, Tensor, PrefillInputs], Tensor]
"""(q [T, H, C], pool of one layer [blocks, 2, K, 64, C], inputs) gives the output [T, H*C]."""


def find_flash_attention(device: torch.device, dtype: torch.dtype) -> Attention | None:
    """Paged FlashAttention 3 by way of torch.nn.attention.varlen, or None."""
    if device.type != "cuda" or dtype is not torch.bfloat16 or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from torch.nn.attention import activate_flash_attention_impl
        from torch.nn.attention.varlen import varlen_attn

        if not {"block_table", "seqused_k"} <= set(inspect.signature(varlen_attn).parameters):
            return None
        activate_flash_attention_impl("FA3")
    except Exception as error:  # whatever its package raises on import, prompts can be computed without it
        logger.info("FlashAttention 3 is not available (%s); prompts run through Triton", error)
        return None
    return _attend


def _attend(q_THC: Tensor, layer_pool: Tensor, inputs: PrefillInputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, values = (layer_pool[:, half].transpose(1, 2) for half in (0, 1))  # [blocks, 64, K, C], no copy
    output: Tensor = varlen_attn(  # type: ignore[assignment]  # a pair only where aux is asked for
        q_THC, keys, values, inputs.cuts, None, inputs.most_rows, inputs.longest,
        window_size=(-1, 0), enable_gqa=True, seqused_k=inputs.ends, block_table=inputs.tables,
    )  # fmt: skip
    return output.flatten(1)


_SPLITS, _MIN_SPLIT_BLOCKS = 16, 4
"""Decode attention cuts each sequence into at most 16 runs of at least 256 positions, in deterministic mode."""
_MOST_SPLITS, _LEAST_SPLIT_BLOCKS = 32, 2
"""Bounds of what is chosen by the number of rows otherwise."""


class WeightSource(Protocol):
    """What workers.model.checkpoint.weights.Checkpoint offers."""

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
        loader: Loader | None = None,
    ) -> None:
        """Takes every weight of the source in turn. Raises InvalidConfig when one is missing, misshapen or unknown.

        `loader` takes a part of each instead, for a model of a part's dimensions.
        """
        self.config = config
        self._deterministic = deterministic
        self._flash = None if deterministic else find_flash_attention(device, dtype)
        is_cuda = device.type == "cuda"
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1
        rope = RotaryEmbedding(config.head_dim, config.rope_theta, max_len)
        cos, sin = rope.at(torch.arange(max_len))
        self._rotation = (cos.squeeze(1).to(device), sin.squeeze(1).to(device))
        D, tied = config.hidden_size, config.tie_word_embeddings
        loader = loader or Loader(config, source, dtype, device, deterministic)
        self._embedding_VD = loader.vocabulary("model.embed_tokens.weight")
        self._layers = tuple(loader.layer(index) for index in range(config.num_layers))
        self._norm_D = source.take("model.norm.weight", (D,), dtype).to(device)
        head_VD = self._embedding_VD if tied else loader.vocabulary("lm_head.weight")
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


class Loader:
    """Takes a model's weights from a source, each whole."""

    def __init__(
        self, config: ErnieConfig, source: WeightSource, dtype: torch.dtype, device: torch.device, deterministic: bool
    ) -> None:
        self._config, self._source = config, source
        self._dtype, self._device, self._deterministic = dtype, device, deterministic

    def cut(self, name: str, dim: int, total: int, unit: int, other: int) -> Tensor:
        """A matrix of `total` pieces of `unit` rows (dim 0) or columns (dim 1); a rank may have a share of the pieces."""
        shape = (total * unit, other) if dim == 0 else (other, total * unit)
        return self._source.take(name, shape, self._dtype).to(self._device)

    def vocabulary(self, name: str) -> Tensor:
        return self.cut(name, 0, self._config.vocab_size, 1, self._config.hidden_size)

    def take(self, name: str, *shape: int, exact: bool = False) -> Tensor:
        return self._source.take(name, shape, torch.float32 if exact else self._dtype).to(self._device)

    def layer(self, index: int) -> Layer:
        config, prefix = self._config, f"model.layers.{index}"
        D, C = config.hidden_size, config.head_dim
        heads = (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads))
        moe = config.moe if config.moe is not None and config.moe.has_layer(index) else None
        parts = [self.cut(f"{prefix}.self_attn.{part}_proj.weight", 0, count, C, D) for part, count in heads]
        return Layer(
            input_norm_D=self.take(f"{prefix}.input_layernorm.weight", D),
            qkv=Linear(torch.cat(parts), self._deterministic),
            output=Linear(
                self.cut(f"{prefix}.self_attn.o_proj.weight", 1, config.num_heads, C, D), self._deterministic
            ),
            post_attention_norm_D=self.take(f"{prefix}.post_attention_layernorm.weight", D),
            mlp=self._dense(f"{prefix}.mlp", config.intermediate_size) if moe is None else self.mixture(index, moe),
        )

    def mixture(self, index: int, moe: MoeConfig) -> MixtureOfExperts:
        router, bias_E = self.router(index, moe)
        return MixtureOfExperts(
            router, bias_E, moe.num_experts_per_token, moe.norm_min,
            self.experts(index, moe, range(moe.num_experts)), self.shared_experts(index, moe),
        )  # fmt: skip

    def router(self, index: int, moe: MoeConfig) -> tuple[Linear, Tensor]:
        prefix, E = f"model.layers.{index}.mlp", moe.num_experts
        weight_ED = self.take(f"{prefix}.gate.weight", E, self._config.hidden_size, exact=True)
        bias_1E = self.take(f"{prefix}.moe_statics.e_score_correction_bias", 1, E, exact=True)
        return Linear(weight_ED, self._deterministic), bias_1E[0]

    def experts(self, index: int, moe: MoeConfig, held: Sequence[int]) -> Experts:
        """The weights of `held`, one after the other."""
        D, F = self._config.hidden_size, moe.intermediate_size
        gate_up_EXD = torch.empty(len(held), 2 * F, D, dtype=self._dtype, device=self._device)
        down_EDF = torch.empty(len(held), D, F, dtype=self._dtype, device=self._device)
        for at, expert in enumerate(held):
            prefix = f"model.layers.{index}.mlp.experts.{expert}"
            gate_up_EXD[at, :F] = self.take(f"{prefix}.gate_proj.weight", F, D)
            gate_up_EXD[at, F:] = self.take(f"{prefix}.up_proj.weight", F, D)
            down_EDF[at] = self.take(f"{prefix}.down_proj.weight", D, F)
        return Experts(gate_up_EXD, down_EDF, self._deterministic)

    def shared_experts(self, index: int, moe: MoeConfig) -> FeedForward | None:
        """Whole, always: they meet a rank's own rows."""
        if not moe.num_shared_experts:
            return None
        D, width, prefix = (
            self._config.hidden_size,
            moe.intermediate_size * moe.num_shared_experts,
            "mlp.shared_experts",
        )
        gate, up = (self.take(f"model.layers.{index}.{prefix}.{part}_proj.weight", width, D) for part in ("gate", "up"))
        down = self.take(f"model.layers.{index}.{prefix}.down_proj.weight", D, width)
        return FeedForward(torch.cat((gate, up)), down, self._deterministic)

    def _dense(self, prefix: str, width: int) -> FeedForward:
        D = self._config.hidden_size
        gate, up = (self.cut(f"{prefix}.{part}_proj.weight", 0, width, 1, D) for part in ("gate", "up"))
        return FeedForward(
            torch.cat((gate, up)), self.cut(f"{prefix}.down_proj.weight", 1, width, 1, D), self._deterministic
        )
