"""Profiles by name, such as `h200:21B-A3B:bf16:tp1`: a roofline over data sheets, and the KV room that weights leave."""

from __future__ import annotations

from cluster.sim.profiles.accelerators import Accelerator, accelerator
from cluster.sim.profiles.layout import read_layout
from cluster.sim.profiles.models import Parameters, WeightType, published_model, weight_type
from cluster.sim.profiles.profile import Profile
from cluster.sim.profiles.roofline import VALUE_BYTES, RooflineCost, kv_bytes_per_token
from workers.config import ParallelConfig
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.runner import BLOCK_SIZE

USABLE_MEMORY = 0.90
"""Of an accelerator's memory; the rest goes to the CUDA context, NCCL's buffers, graphs and fragments."""
MAX_BATCHED_TOKENS = 8192
MAX_NUM_SEQS = 256
"""Of each data-parallel part; what Baton's settings would be on such hardware (the defaults are for CPUs)."""
MIN_POOL_TOKENS = 8192
"""A layout whose KV pools hold less is refused: hardly a prompt of real traces would fit."""
ROUTER_S = 0.0005
"""HTTP, template, tokenizing and routing of a message. Origin: docs/benchmarks/router.md, a prompt of 2K."""
CONTROL_LATENCY_S = 0.0005
"""Origin: a small gRPC message between two processes of one machine, docs/benchmarks/router.md; a data centre's network adds tens of microseconds."""
TRANSFER_LATENCY_S = 0.001
"""Connection known, first piece announced. Origin: the same measurements."""


def published_profile(name: str) -> Profile:
    """`hardware:model:dtype:layout`; dtype and layout may be left out (bf16, tp1). Raises InvalidConfig in one sentence."""
    parts = name.split(":")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise InvalidConfig(f"profile {name!r} must be hardware:model:dtype:layout, such as h200:21B-A3B:bf16:tp1")
    hardware, model, dtype, layout = (*parts, *("bf16", "tp1")[len(parts) - 2 :])
    config = published_model(model)
    cost = RooflineCost(accelerator(hardware), config, weight_type(dtype), read_layout(layout, config))
    return profile_of(cost, name=":".join((hardware, model, dtype, layout)), model=model)


def profile_of(cost: RooflineCost, name: str, model: str) -> Profile:
    """The whole profile that goes with a step cost. Raises InvalidConfig when weights leave too little room for KV."""
    num_blocks = pool_blocks(cost.accelerator, cost.config, cost.weights, cost.parallel, name)
    size, tensor = cost.parallel.size, cost.parallel.tensor_parallel
    pools = size // tensor
    return Profile(
        name=name,
        model=model,
        cost=cost,
        kv_bytes_per_token=kv_bytes_per_token(cost.config),
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks * pools,
        max_batched_tokens=MAX_BATCHED_TOKENS * pools,
        max_num_seqs=MAX_NUM_SEQS * pools,
        max_model_len=min(cost.config.max_position_embeddings, num_blocks * BLOCK_SIZE),
        transfer_latency_s=TRANSFER_LATENCY_S,
        transfer_bytes_per_s=size * cost.accelerator.adapter_bytes_per_s * cost.efficiency.link,
        router_s=ROUTER_S,
        control_latency_s=CONTROL_LATENCY_S,
    )


def pool_blocks(
    hardware: Accelerator, config: ErnieConfig, weights: WeightType, parallel: ParallelConfig, name: str
) -> int:
    """KV blocks of one data-parallel part. Raises InvalidConfig when there are too few for a prompt."""
    usable = hardware.memory_bytes * USABLE_MEMORY
    taken = weight_bytes(config, weights, parallel)
    working = _working_bytes(config, parallel)
    tokens = (usable - taken - working) * parallel.tensor_parallel / kv_bytes_per_token(config)
    if tokens < MIN_POOL_TOKENS:
        raise InvalidConfig(
            f"{name} does not fit: weights take {taken / 1e9:.1f} GB and a step {working / 1e9:.1f} GB of the {usable / 1e9:.1f} GB "
            f"that a rank can use, which leaves less than {MIN_POOL_TOKENS} tokens of KV; take more ranks, or a smaller dtype"
        )
    return int(tokens // BLOCK_SIZE)


def weight_bytes(config: ErnieConfig, weights: WeightType, parallel: ParallelConfig) -> float:
    """Of one rank, as workers.model.decoder.rank lays weights out: attention and dense layers are cut by `tensor_parallel`, experts over
    all ranks; each rank has its own shared experts and routers."""
    parameters, tensor, size, moe = Parameters.of(config), parallel.tensor_parallel, parallel.size, config.moe
    tables = parameters.table / tensor * (1 if config.tie_word_embeddings else 2)
    slots = 0.0 if moe is None else (moe.num_experts + parallel.redundant_experts) / size
    common = (parameters.attention + parameters.dense) / tensor + parameters.shared
    experts = parameters.num_mixtures * slots * parameters.expert
    return (
        common * weights.dense_bytes
        + experts * weights.expert_bytes
        + parameters.router * 4
        + (tables + parameters.norms) * VALUE_BYTES
    )


def _working_bytes(config: ErnieConfig, parallel: ParallelConfig) -> float:
    """The widest layer of a full step, in and out, in bf16, and fp32 logits of as many sequences as may run."""
    tensor, moe = parallel.tensor_parallel, config.moe
    width = config.intermediate_size / tensor
    if moe is not None:
        width = max(width, moe.num_experts_per_token * (moe.intermediate_size + config.hidden_size))
    rows = MAX_BATCHED_TOKENS * (4 * config.hidden_size + 2 * width) * VALUE_BYTES
    return rows + MAX_NUM_SEQS * config.vocab_size * 4 / tensor
