"""What vendors publish about the accelerators that profiles are made for, and which share of it software reaches. Numbers only.

Nothing here was measured by this project on a GPU: rates are the vendors' peaks, and the efficiencies are what others have
published of good kernels. `baton profile` measures what a worker really does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from workers.config import Count, Delay, Share, Text
from workers.errors import InvalidConfig

Rate = Annotated[float, Gt(0)]


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator of a node of `per_node`. Rates per second, of one direction where a link has two; dense, not sparse, FLOPs."""

    name: Text
    memory_bytes: Rate
    memory_bytes_per_s: Rate
    bf16_flops_per_s: Rate
    fp8_flops_per_s: Rate
    link_bytes_per_s: Rate
    """To the other accelerators of the node (NVLink through NVSwitch)."""
    adapter_bytes_per_s: Rate
    """To other nodes: one network adapter an accelerator."""
    per_node: Count
    source: Text


ACCELERATORS = (
    Accelerator(
        name="h800",
        memory_bytes=80e9,
        memory_bytes_per_s=3.35e12,
        bf16_flops_per_s=989e12,
        fp8_flops_per_s=1979e12,
        link_bytes_per_s=200e9,
        adapter_bytes_per_s=50e9,
        per_node=8,
        source="NVIDIA H100 SXM data sheet for what the H800 shares with it; NVLink 400 GB/s both ways and one 400 Gb/s "
        "ConnectX-7 a GPU as in DeepSeek-AI, Insights into DeepSeek-V3 (2025), section 4",
    ),
    Accelerator(
        name="h200",
        memory_bytes=141e9,
        memory_bytes_per_s=4.8e12,
        bf16_flops_per_s=989e12,
        fp8_flops_per_s=1979e12,
        link_bytes_per_s=450e9,
        adapter_bytes_per_s=50e9,
        per_node=8,
        source="NVIDIA H200 SXM data sheet (FLOPs halved, it states them with sparsity); DGX H200: one 400 Gb/s ConnectX-7 a GPU",
    ),
    Accelerator(
        name="b200",
        memory_bytes=180e9,
        memory_bytes_per_s=8.0e12,
        bf16_flops_per_s=2250e12,
        fp8_flops_per_s=4500e12,
        link_bytes_per_s=900e9,
        adapter_bytes_per_s=50e9,
        per_node=8,
        source="NVIDIA DGX B200 data sheet, an eighth of the system (FLOPs halved, it states them with sparsity): 1.44 TB and "
        "64 TB/s of HBM3e, NVLink 5 1.8 TB/s both ways, one 400 Gb/s ConnectX-7 a GPU",
    ),
)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the published rates that a serving engine reaches, and what a step takes besides. Assumptions, each with its origin."""

    memory: Share = 0.85
    """Weights and KV read. Origin: streaming reads reach 4.3 of 4.8 TB/s on an H200 (0.90); kernels that also unpack and reduce, less."""
    dense: Share = 0.70
    """Attention projections and dense feed-forward. Origin: large bf16 products reach 790 of 989 TFLOP/s on an H200 (0.80); a step's
    products are smaller, and norms and activations run between them."""
    experts: Share = 0.55
    """Grouped products of experts, a few hundred rows each. Origin: DeepGEMM's published grouped FP8 products on an H800 reach 0.55 to 0.7 of its peak."""
    unpacking: Share = 0.85
    """Of the bf16 rate, where int8 or int4 weights are turned into bf16 in the kernel. Origin: Marlin-like kernels at large batch, as published."""
    attention: Share = 0.50
    """Causal attention of prompts. Origin: FlashAttention-3 publishes 0.6 to 0.75 of the peak for long prompts, a Triton kernel with paged KV less."""
    link: Share = 0.80
    """Of NVLink and of adapters. Origin: DeepSeek-AI (2025): 160 of 200 GB/s and 40 of 50 GB/s."""
    imbalance: Annotated[float, Ge(1)] = 1.2
    """Rows of the busiest rank over the mean. Origin: worker.parallel.rebalance_above, where Baton begins to move experts."""
    step_s: Delay = 300e-6
    """Scheduling, sampling and results of a step, as far as the accelerator waits for them."""
    layer_s: Delay = 20e-6
    """Starts and ends of a layer's ten or so kernels within a CUDA graph, 2 us each."""
    near_latency_s: Delay = 20e-6
    """One small exchange among the ranks of a node. Origin: NCCL's small all-to-all and all-reduce on NVSwitch take 15 to 30 us."""
    far_latency_s: Delay = 45e-6
    """The same when it leaves the node. Origin: the smallest low-latency DeepEP kernels, as published, less their bytes."""


def accelerator(name: str) -> Accelerator:
    """By name, in any case. Raises InvalidConfig."""
    for known in ACCELERATORS:
        if known.name == name.lower():
            return known
    raise InvalidConfig(
        f"hardware {name!r} has no published profile: there are {', '.join(each.name for each in ACCELERATORS)}, "
        "and `baton profile` measures any machine that runs a worker"
    )
