"""The seconds of an engine step from first principles: bytes over bandwidth, FLOPs over rate, exchanges among ranks. Pure arithmetic.

Every part of a step costs the longer of what it reads and what it multiplies, each at the share of the published rate that
software reaches (accelerators.Efficiency). A group's sequences are taken to be spread evenly over its data-parallel parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.sim.profiles.accelerators import Accelerator, Efficiency
from cluster.sim.profiles.models import Parameters, WeightType
from workers.config import ParallelConfig
from workers.model.checkpoint.ernie_config import ErnieConfig

VALUE_BYTES = 2
"""Of keys, values and rows: bf16."""
_QUERY_TILE = 128
"""Queries of a prompt that read keys and values together."""


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """Implements profile.StepCost for one worker: `parallel.size` ranks that compute one step together.

    Not less for more of anything. `layout` was checked by workers.model.parallel.layout.
    """

    accelerator: Accelerator
    config: ErnieConfig
    weights: WeightType
    parallel: ParallelConfig
    efficiency: Efficiency = field(default_factory=Efficiency)
    _rates: _Rates = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rates", _Rates.of(self))

    def step_s(self, prefill_tokens: int, prefill_attended: int, num_decodes: int, decode_attended: int) -> float:
        rates = self._rates
        rows = prefill_tokens + num_decodes
        dense_s = max(rates.dense_read_s, rows * rates.dense_row_s)
        head_s = max(rates.head_read_s, num_decodes * rates.head_row_s)
        attention_s = prefill_attended * rates.prefill_attended_s + decode_attended * rates.decode_attended_s
        hit = 1 - rates.miss**rows
        experts_s = max(hit * rates.experts_read_s, rows * rates.expert_row_s)
        return rates.fixed_s + dense_s + head_s + attention_s + experts_s + rows * rates.exchange_row_s


@dataclass(frozen=True, slots=True)
class _Rates:
    """Constants of a layout: seconds to read something once, and seconds a row (a token of the whole group) or an attended token."""

    fixed_s: float
    dense_read_s: float
    dense_row_s: float
    head_read_s: float
    head_row_s: float
    prefill_attended_s: float
    decode_attended_s: float
    miss: float
    """The share of experts that one row does not choose."""
    experts_read_s: float
    expert_row_s: float
    exchange_row_s: float

    @staticmethod
    def of(cost: RooflineCost) -> _Rates:
        config, weights, share = cost.config, cost.weights, cost.efficiency
        accelerator, parameters, moe = cost.accelerator, Parameters.of(config), config.moe
        size, tensor = cost.parallel.size, cost.parallel.tensor_parallel
        pools = size // tensor
        read = accelerator.memory_bytes_per_s * share.memory
        bf16 = accelerator.bf16_flops_per_s
        product = (
            accelerator.fp8_flops_per_s
            if weights.multiplies_fp8
            else bf16 * (share.unpacking if weights.unpacks else 1)
        )

        cut = parameters.attention + parameters.dense
        # A rank computes 1/tensor of attention for its pool's rows, and whole shared experts for the rows that it brings.
        dense_read = (cut / tensor + parameters.shared) * weights.dense_bytes + parameters.router * 4
        dense_flops = 2 * (cut / tensor / pools + (parameters.shared + parameters.router) / size)
        attention_flops = 4 * config.num_layers * config.num_heads * config.head_dim / size
        kv_bytes = kv_bytes_per_token(config) / size
        experts_read = expert_row = 0.0
        miss = 1.0
        if moe is not None:
            slots = (moe.num_experts + cost.parallel.redundant_experts) / size
            experts_read = parameters.num_mixtures * slots * parameters.expert * weights.expert_bytes
            expert_row = 2 * parameters.num_mixtures * moe.num_experts_per_token * parameters.expert / size
            expert_row *= share.imbalance if size > 1 else 1
            miss = 1 - moe.num_experts_per_token / moe.num_experts
        return _Rates(
            fixed_s=share.step_s + config.num_layers * share.layer_s + _latency_s(cost, parameters),
            dense_read_s=dense_read / read,
            dense_row_s=dense_flops / (product * share.dense),
            head_read_s=parameters.table / tensor * VALUE_BYTES / read,
            head_row_s=2 * parameters.table / size / (bf16 * share.dense),
            prefill_attended_s=max(attention_flops / (bf16 * share.attention), kv_bytes / _QUERY_TILE / read),
            decode_attended_s=max(kv_bytes / read, attention_flops / (bf16 * share.attention)),
            miss=miss,
            experts_read_s=experts_read / read,
            expert_row_s=expert_row / (product * share.experts),
            exchange_row_s=_exchange_row_s(cost, parameters),
        )


def kv_bytes_per_token(config: ErnieConfig) -> int:
    """Keys and values of one token, of all layers and heads."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * VALUE_BYTES


def _latency_s(cost: RooflineCost, parameters: Parameters) -> float:
    """What the exchanges of a step take however little they carry: two all-to-alls a mixture layer, and, with tensor
    parallelism, a sum after each attention and a sum or gathering after each feed-forward."""
    num_ranks, per_node, share = cost.parallel.size, cost.accelerator.per_node, cost.efficiency
    tensor = cost.parallel.tensor_parallel
    spread = share.near_latency_s if num_ranks <= per_node else share.far_latency_s
    within = share.near_latency_s if tensor <= per_node else share.far_latency_s
    exchanges = 2 * parameters.num_mixtures * spread if num_ranks > 1 and cost.config.moe is not None else 0.0
    return exchanges + (2 * cost.config.num_layers * within if tensor > 1 else 0.0)


def _exchange_row_s(cost: RooflineCost, parameters: Parameters) -> float:
    """Seconds that a row of the group adds to all exchanges of a step, at the bandwidth of links and adapters.

    A row visits G (1 - (1 - 1/G)^k) ranks, and with exact_combine, the default, each of its k experts' outputs returns.
    Rows for ranks of other nodes leave by the adapter, the others by NVLink, both at once.
    """
    config, size, tensor = cost.config, cost.parallel.size, cost.parallel.tensor_parallel
    accelerator, share, per_node = cost.accelerator, cost.efficiency, cost.accelerator.per_node
    link, adapter = accelerator.link_bytes_per_s * share.link, accelerator.adapter_bytes_per_s * share.link
    row = config.hidden_size * VALUE_BYTES
    seconds = 0.0
    if config.moe is not None and size > 1:
        chosen = config.moe.num_experts_per_token
        visited = size * (1 - (1 - 1 / size) ** chosen)
        back = chosen if cost.parallel.exact_combine else visited
        elsewhere = (visited + back) * row * (size - 1) / size * parameters.num_mixtures / size
        near = min(1.0, (min(per_node, size) - 1) / (size - 1))
        seconds += max(elsewhere * near / link, elsewhere * (1 - near) / adapter) * share.imbalance
    if tensor > 1:
        # A ring moves every value twice, but for a rank's own part; a pool's rows are its share of the group's.
        moved = 2 * (tensor - 1) / tensor * row * (tensor / size)
        seconds += 2 * config.num_layers * moved / (link if tensor <= per_node else adapter)
    return seconds
