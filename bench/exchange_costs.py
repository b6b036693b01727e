"""What expert parallelism has to move, and how long that takes at published link speeds. Pure arithmetic.

R is the number of ranks that a token's row visits, k its experts, G the ranks, H the hidden size. Nothing here is
measured on a GPU: compute times are rooflines, transfer times are bytes over the published speed of one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_BYTES = 2
"""bf16 both ways."""
H200_BYTES_S = 4.3e12
NVLINK_BYTES_S = 450e9
"""NVLink 4: 900 GB/s a GPU, both directions together."""
NIC_BYTES_S = 50e9
"""One 400 Gb/s adapter a GPU."""


@dataclass(frozen=True)
class Mixture:
    """What of a model decides the cost of its mixture layers."""

    name: str
    hidden_size: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    expert_size: int


MODELS = (Mixture("21B-A3B", 2560, 27, 64, 6, 1536), Mixture("300B-A47B", 8192, 51, 64, 8, 3584))


def ranks_visited(num_ranks: int, num_choices: int) -> float:
    """Expected ranks of a token's experts, each rank once, when routing is even: G (1 - (1 - 1/G)^k)."""
    return num_ranks * (1 - (1 - 1 / num_ranks) ** num_choices)


def token_bytes(hidden_size: int, num_choices: int, num_ranks: int, exact: bool, itemsize: int = ROW_BYTES) -> float:
    """Bytes a token and layer that leave a rank for others: its row and slot numbers out, outputs back.

    `exact` returns one row a choice, otherwise one row a rank visited (and 4 bytes of weight a choice go out with it).
    """
    remote = (num_ranks - 1) / num_ranks
    visited = ranks_visited(num_ranks, num_choices) * remote
    out = visited * (hidden_size * itemsize + num_choices * (2 if exact else 6))
    back = (num_choices * remote if exact else visited) * hidden_size * itemsize
    return out + back


@dataclass(frozen=True)
class Projection:
    """One layer of one decode step, microseconds; `share` is exchange over exchange plus experts without overlap."""

    exchange_us: float
    experts_us: float

    @property
    def share(self) -> float:
        return self.exchange_us / (self.exchange_us + self.experts_us)


def project(model: Mixture, num_ranks: int, ranks_per_node: int, batch: int, exact: bool) -> Projection:
    """Bandwidth terms of a mixture layer for `batch` tokens a rank; latencies of launches and links are not in it.

    Rows for ranks of other nodes leave by the NIC, the others by NVLink, both at once. Experts are read once.
    """
    total = batch * token_bytes(model.hidden_size, model.experts_per_token, num_ranks, exact)
    near = (ranks_per_node - 1) / (num_ranks - 1) if num_ranks > 1 else 0.0
    exchange_s = max(total * near / NVLINK_BYTES_S, total * (1 - near) / NIC_BYTES_S)
    hit = model.num_experts * (1 - (1 - model.experts_per_token / model.num_experts) ** (batch * num_ranks))
    read = hit / num_ranks * 3 * model.hidden_size * model.expert_size * ROW_BYTES
    return Projection(exchange_s * 1e6, read / H200_BYTES_S * 1e6)
