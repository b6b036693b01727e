"""What a GPU allows at best for a model of given dimensions: bytes over bandwidth, FLOPs over peak. Pure arithmetic.

Embeddings are tied: the table counts once, as the output projection. Norms and routers are too small to matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.model.checkpoint.ernie_config import ErnieConfig


@dataclass(frozen=True)
class Limits:
    """`value_bytes` per weight and KV element; rates as measured in the same run."""

    config: ErnieConfig
    value_bytes: int
    bytes_per_s: float
    flops_per_s: float

    def decode_tokens_per_s(self, batch: int, context: int) -> float:
        """A step reads common weights, the experts that are hit, and the keys and values of the batch.

        With even choices a batch of B hits E * (1 - (1 - k/E)^B) experts of a layer.
        """
        experts = 0.0
        moe = self.config.moe
        if moe is not None:
            hit = moe.num_experts * (1 - (1 - moe.num_experts_per_token / moe.num_experts) ** batch)
            experts = self._num_moe_layers * hit * self._expert_params
        kv = 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim
        values = self._common_params + experts + batch * context * kv
        return batch * self.bytes_per_s / (values * self.value_bytes)

    def prefill_tokens_per_s(self, num_tokens: int) -> float:
        """Each token is multiplied with the active parameters but the output projection, each query with half the context."""
        config, moe = self.config, self.config.moe
        active = self._common_params - config.vocab_size * config.hidden_size
        if moe is not None:
            active += self._num_moe_layers * moe.num_experts_per_token * self._expert_params
        attention = 2 * config.num_layers * config.num_heads * config.head_dim * num_tokens**2
        return num_tokens * self.flops_per_s / (2 * active * num_tokens + attention)

    @property
    def _num_moe_layers(self) -> int:
        moe = self.config.moe
        return 0 if moe is None else sum(moe.has_layer(layer) for layer in range(self.config.num_layers))

    @property
    def _expert_params(self) -> int:
        """One expert of one layer."""
        return 0 if self.config.moe is None else 3 * self.config.hidden_size * self.config.moe.intermediate_size

    @property
    def _common_params(self) -> int:
        """What every token meets: attention, dense and shared feed-forward, the output projection."""
        config = self.config
        attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
        dense = 3 * config.hidden_size * config.intermediate_size * (config.num_layers - self._num_moe_layers)
        num_shared = 0 if config.moe is None else config.moe.num_shared_experts
        shared = self._num_moe_layers * num_shared * self._expert_params
        return config.num_layers * attention + dense + shared + config.vocab_size * config.hidden_size
