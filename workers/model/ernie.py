"""The ERNIE 4.5 decoder: embedding, pre-norm layers of attention and feed-forward or mixture of experts, logits.

It reads like the paper (ERNIE 4.5 Technical Report, section 2); what a batch is, and where keys and values live, is in
StepPlan and KvPool. Shapes: T rows of a step, D hidden, H query heads, K key-value heads, C channels of a head, V
vocabulary, R rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.attention import attend
from workers.model.ernie_config import ErnieConfig, MoeConfig
from workers.model.kv_memory import KvPool
from workers.model.layers import FeedForward, Linear, RMSNorm
from workers.model.moe import MixtureOfExperts, Router
from workers.model.rope import RotaryEmbedding, rotate
from workers.model.step_plan import StepPlan, plan_step
from workers.model.weights import Checkpoint
from workers.runner import Batch, LayerHook

Take = Callable[..., Tensor]
"""take(name below a prefix, *shape) gives a weight in the model's dtype."""


@dataclass(frozen=True, slots=True)
class Layer:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    input_norm: RMSNorm
    qkv: Linear
    output: Linear
    post_attention_norm: RMSNorm
    mlp: FeedForward | MixtureOfExperts

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, *self.mlp.linears)


class Ernie:
    """A text model with its weights packed in `dtype`."""

    def __init__(self, config: ErnieConfig, checkpoint: Checkpoint, dtype: torch.dtype, max_len: int) -> None:
        """Takes every weight of the checkpoint in turn. Raises InvalidConfig when one is missing, misshapen or unknown."""
        self.config = config
        self._dtype = dtype
        self._rope = RotaryEmbedding(config.head_dim, config.rope_theta, max_len)
        V, D = config.vocab_size, config.hidden_size
        name = "model.embed_tokens.weight"
        stored_dtype = min(checkpoint.stored_dtype(name), dtype, key=lambda kind: kind.itemsize)
        # kept apart from the file, narrow: rows are widened when they are looked up
        self._embedding_VD = checkpoint.take(name, (V, D), stored_dtype).clone()
        self._layers = tuple(_load_layer(config, checkpoint, dtype, index) for index in range(config.num_layers))
        self._norm = RMSNorm(checkpoint.take("model.norm.weight", (D,), dtype).clone(), config.rms_norm_eps)
        head = name if config.tie_word_embeddings else "lm_head.weight"
        self._head = Linear(checkpoint.take(head, (V, D), dtype))
        checkpoint.require_all_taken(unused=("lm_head.weight",) if config.tie_word_embeddings else ())

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*(linear for layer in self._layers for linear in layer.linears), self._head)

    def compute(self, batch: Batch, pool: KvPool, on_layer: LayerHook | None = None) -> Tensor:
        """Runs the layers over a batch, writes KV, returns hidden states [T, D] for `logits`."""
        plan = plan_step(batch, pool)
        if len(plan.fresh_blocks):
            pool.clear(plan.fresh_blocks)
        return self.forward(plan, pool, on_layer)

    def forward(self, plan: StepPlan, pool: KvPool, on_layer: LayerHook | None = None) -> Tensor:
        """Hidden states [T, D] after the last layer; keys and values of all rows are in the pool afterwards."""
        H, K, C = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        rotation = self._rope.at(plan.positions_T)
        x_TD = self._embedding_VD.index_select(0, plan.token_ids_T).to(self._dtype)
        for index, layer in enumerate(self._layers):
            qkv_THC = layer.qkv(layer.input_norm(x_TD)).view(-1, H + 2 * K, C)
            q_THC, k_TKC = torch.split(rotate(qkv_THC[:, : H + K], rotation), [H, K], dim=1)
            pool.write(index, plan.slots, torch.cat((k_TKC, qkv_THC[:, H + K :]), dim=1))
            if on_layer is not None and (index + 1) % on_layer.every == 0 and index + 1 < len(self._layers):
                on_layer.call(index + 1)
            x_TD = x_TD + layer.output(attend(q_THC, pool, index, plan).to(self._dtype))
            x_TD = x_TD + layer.mlp(layer.post_attention_norm(x_TD))
        return x_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of hidden states."""
        return self._head(self._norm(x_RD)).float()

    def greedy(self, x_RD: Tensor) -> list[int]:
        """The most likely token of each row, of equals the lowest."""
        tokens: list[int] = self.logits(x_RD).argmax(-1).tolist()
        return tokens


def _load_layer(config: ErnieConfig, checkpoint: Checkpoint, dtype: torch.dtype, index: int) -> Layer:
    def take(name: str, *shape: int, exact: bool = False) -> Tensor:
        return checkpoint.take(f"model.layers.{index}.{name}", shape, torch.float32 if exact else dtype)

    D, C = config.hidden_size, config.head_dim
    H, K = config.num_heads * C, config.num_kv_heads * C
    moe = config.moe if config.moe is not None and config.moe.has_layer(index) else None
    return Layer(
        input_norm=RMSNorm(take("input_layernorm.weight", D).clone(), config.rms_norm_eps),
        qkv=Linear(
            torch.cat([take(f"self_attn.{part}_proj.weight", rows, D) for part, rows in (("q", H), ("k", K), ("v", K))])
        ),
        output=Linear(take("self_attn.o_proj.weight", D, H)),
        post_attention_norm=RMSNorm(take("post_attention_layernorm.weight", D).clone(), config.rms_norm_eps),
        mlp=_load_feed_forward(take, "mlp", D, config.intermediate_size) if moe is None else _load_moe(take, moe, D),
    )


def _load_feed_forward(take: Take, prefix: str, D: int, width: int) -> FeedForward:
    return FeedForward(
        take(f"{prefix}.gate_proj.weight", width, D),
        take(f"{prefix}.up_proj.weight", width, D),
        take(f"{prefix}.down_proj.weight", D, width),
    )


def _load_moe(take: Take, moe: MoeConfig, D: int) -> MixtureOfExperts:
    E, width = moe.num_experts, moe.intermediate_size
    bias_1E = take("mlp.moe_statics.e_score_correction_bias", 1, E, exact=True).clone()
    router = Router(take("mlp.gate.weight", E, D, exact=True), bias_1E[0], moe.num_experts_per_token, moe.norm_min)
    experts = [_load_feed_forward(take, f"mlp.experts.{expert}", D, width) for expert in range(E)]
    num_shared = moe.num_shared_experts
    shared = _load_feed_forward(take, "mlp.shared_experts", D, width * num_shared) if num_shared else None
    return MixtureOfExperts(router, experts, shared)
