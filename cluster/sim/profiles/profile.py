"""What one worker costs in seconds and bytes: an engine step, a KV transfer, a router's and the control plane's overhead. Knows no scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


class StepCost(Protocol):
    """Seconds of one engine step. An attended count is the sum, over the step's tokens of that kind, of the context each attends to."""

    def step_s(self, prefill_tokens: int, prefill_attended: int, num_decodes: int, decode_attended: int) -> float:
        """Above zero, and not less for more of anything. `decode_attended` may be an array [N] instead: of so many steps, and so is the answer."""
        ...


@dataclass(frozen=True, slots=True)
class LinearCost:
    """A sum of parts: the simplest cost that grows with everything it should grow with."""

    base_s: float = 0.004
    prefill_token_s: float = 2.0e-5
    prefill_attended_s: float = 1.0e-9
    decode_s: float = 5.0e-5
    decode_attended_s: float = 4.0e-9

    def step_s(self, prefill_tokens: int, prefill_attended: int, num_decodes: int, decode_attended: int) -> float:
        return (
            self.base_s
            + prefill_tokens * self.prefill_token_s
            + prefill_attended * self.prefill_attended_s
            + num_decodes * self.decode_s
            + decode_attended * self.decode_attended_s
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """One worker of one layout on one kind of hardware. All workers of a simulation have the same."""

    name: str = "analytic"
    model: str = "any"
    cost: StepCost = field(default_factory=LinearCost)
    kv_bytes_per_token: int = 65536
    block_size: int = 64
    """Tokens in a KV block: that of workers.runner."""
    num_blocks: int = 8192
    """KV blocks of the worker's pool."""
    max_batched_tokens: int = 8192
    """Tokens of one step, prompts and decodes together."""
    max_num_seqs: int = 256
    max_model_len: int = 131072
    """Prompt and output of one request, in tokens."""
    transfer_latency_s: float = 0.0002
    """From one worker to another, one way, for a first byte."""
    transfer_bytes_per_s: float = 40e9
    """Of a worker's link in each direction, shared evenly by the transfers that are on it."""
    router_s: float = 0.0002
    """What the router adds to a message between client and worker: its own work and the network, one way."""
    router_token_s: float = 0.0
    """What each prompt token adds before the router has the request and its worker has it: JSON, tokenizing, the wire."""
    connect_s: float = 0.0
    """What a client's new connection adds before its request."""
    control_latency_s: float = 0.0002
    """Of a control message between two workers, one way."""

    def step_s(self, prefill_tokens: int, prefill_attended: int, num_decodes: int, decode_attended: int) -> float:
        """Seconds of one engine step."""
        return self.cost.step_s(prefill_tokens, prefill_attended, num_decodes, decode_attended)

    def decode_run_s(self, num_decodes: int, attended: Counts) -> Seconds:
        """Seconds of steps that only decode, [N], by what each attends to, [N]: each as `step_s` has it, bit for bit."""
        count: Any = attended
        seconds: Any = self.cost.step_s(0, 0, num_decodes, count)
        return np.asarray(seconds, np.float64)
