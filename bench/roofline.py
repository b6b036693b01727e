"""What a machine allows at best: bytes over bandwidth, FLOPs over peak. Pure arithmetic.

A decode step reads every weight that some token of the batch needs once, and the keys and values of the whole batch; a
prefill multiplies every token with the active parameters and every query with half of the context.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model_shapes import BF16_BYTES, FP32_BYTES, Shape
from workloads import Workload


@dataclass(frozen=True)
class Machine:
    """What was reached on this machine, with as many threads as the engines had."""

    read_bytes_per_s: float
    flops_per_s: float
    """Matrix products of bf16 or fp32, whichever is faster."""
    product: str = ""
    """Which one that was."""


def best(measured: Iterable[Machine]) -> Machine:
    """A limit is what was reached once, so the highest of several measurements counts. Raises ValueError for none."""
    machines = list(measured)
    fastest = max(machines, key=lambda machine: machine.flops_per_s)
    return Machine(max(m.read_bytes_per_s for m in machines), fastest.flops_per_s, fastest.product)


def experts_hit(shape: Shape, batch: int) -> float:
    """Expected number of experts of a layer that at least one of `batch` tokens chooses, choices being even."""
    if not shape.num_experts:
        return 0.0
    return shape.num_experts * (1 - (1 - shape.experts_per_token / shape.num_experts) ** batch)


def decode_bytes(shape: Shape, batch: int, context: float) -> float:
    """Bytes that one decode step must read in bf16, at `context` tokens before each new one."""
    experts = shape.num_moe_layers * experts_hit(shape, batch) * shape.expert_params
    weights = (shape.common_params + experts) * BF16_BYTES + shape.router_params * FP32_BYTES
    return weights + batch * context * shape.kv_bytes_per_token


def decode_flops(shape: Shape, batch: int, context: float) -> float:
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * context
    return batch * (2 * shape.active_params + attention)


def prefill_flops(shape: Shape, num_tokens: int) -> float:
    """FLOPs of a prompt of which only the last token needs logits; attention is causal."""
    layers = 2 * (shape.active_params - shape.head_params) * num_tokens
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * num_tokens**2
    return layers + attention + 2 * shape.head_params


def decode_limit(machine: Machine, shape: Shape, batch: int, context: float) -> float:
    """Tokens per second that no engine can exceed, whichever of memory and arithmetic is short."""
    step_s = max(
        decode_bytes(shape, batch, context) / machine.read_bytes_per_s,
        decode_flops(shape, batch, context) / machine.flops_per_s,
    )
    return batch / step_s


def prefill_limit(machine: Machine, shape: Shape, num_tokens: int) -> float:
    """Tokens per second; also bounded by one pass over the weights that the prompt touches."""
    weight_bytes = decode_bytes(shape, num_tokens, 0)
    seconds = max(prefill_flops(shape, num_tokens) / machine.flops_per_s, weight_bytes / machine.read_bytes_per_s)
    return num_tokens / seconds


def limit(machine: Machine, shape: Shape, workload: Workload, num_steps: int) -> float:
    """The limit of a workload; the context of a decode step is that of the middle one of `num_steps`."""
    if workload.kind == "prefill":
        return prefill_limit(machine, shape, workload.context)
    return decode_limit(machine, shape, workload.batch, workload.context + num_steps / 2)
