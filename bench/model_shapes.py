"""The shapes of the random-weight models that bench/engine.py measures, and what they cost in parameters; knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BF16_BYTES = 2
FP32_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """An ERNIE 4.5 text model with tied embeddings. `num_experts` 0 is the dense model.

    With experts, layer 0 is dense and all others are mixtures. `intermediate_size` must be num_kv_heads *
    num_shared_experts * expert_size there: llama.cpp's converter derives the width of the shared experts from it.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    num_shared_experts: int = 0

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - 1 if self.num_experts else 0

    @property
    def head_params(self) -> int:
        """The embedding table, which is the output projection too."""
        return self.vocab_size * self.hidden_size

    @property
    def expert_params(self) -> int:
        """One expert of one layer."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def router_params(self) -> int:
        """The gates of all layers, kept in fp32."""
        return self.num_moe_layers * self.num_experts * self.hidden_size

    @property
    def common_params(self) -> int:
        """What every token reads: attention, dense and shared feed-forward, the output projection; no router, no expert."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        dense = 3 * self.hidden_size * self.intermediate_size * (self.num_layers - self.num_moe_layers)
        shared = self.num_moe_layers * self.num_shared_experts * self.expert_params
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.num_layers * attention + dense + shared + norms + self.head_params

    @property
    def total_params(self) -> int:
        return self.common_params + self.router_params + self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def active_params(self) -> int:
        """What one token is multiplied with, the output projection included."""
        return (
            self.common_params + self.router_params + self.num_moe_layers * self.experts_per_token * self.expert_params
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in bf16."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BF16_BYTES

    @property
    def weight_bytes(self) -> int:
        """Size on disk: bf16, routers in fp32."""
        return (self.total_params - self.router_params) * BF16_BYTES + self.router_params * FP32_BYTES

    def config_json(self, max_len: int) -> dict[str, Any]:
        """config.json as published checkpoints write it."""
        fields: dict[str, Any] = {
            "architectures": ["Ernie4_5_MoeForCausalLM" if self.num_experts else "Ernie4_5ForCausalLM"],
            "model_type": "ernie4_5_moe" if self.num_experts else "ernie4_5",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": max_len,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "use_bias": False,
            "torch_dtype": "bfloat16",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.num_experts:
            fields |= {
                "moe_num_experts": self.num_experts,
                "moe_k": self.experts_per_token,
                "moe_num_shared_experts": self.num_shared_experts,
                "moe_intermediate_size": self.expert_size,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": self.num_layers - 1,
                "moe_layer_interval": 1,
                "moe_norm_min": 1e-12,
                "num_nextn_predict_layers": 0,
            }
        return fields


DENSE = Shape("dense", 103424, 1024, 18, 16, 2, 128, 3072)
"""ERNIE-4.5-0.3B."""
SMALL = Shape("small", 16384, 512, 8, 8, 2, 64, 1024, 32, 4, 256, 2)
"""A mixture of about 0.1 B parameters, 32 M of them active: its step is short, so overheads show."""
BIG = Shape("big", 103424, 1024, 12, 16, 4, 64, 4096, 64, 6, 512, 2)
"""A mixture of about 1.3 B parameters, 0.28 B active, with the vocabulary and the ratios of 21B-A3B."""

SHAPES = {shape.name: shape for shape in (DENSE, SMALL, BIG)}
