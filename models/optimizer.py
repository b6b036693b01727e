"""Muon for weight matrices and Adam for the rest, over parameters alone; it knows nothing of the network or the data.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, found by a Newton-Schulz
iteration, and needs markedly fewer tokens than Adam at this size. Experts are one batch of matrices.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each matrix in the last two dimensions."""
    x = matrix.to(torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; the update's size follows the matrix' shape."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.3) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"])).to(weight.dtype)
                scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)


SLOW_SHARE = 0.1


def is_slow(name: str) -> bool:
    """Matrices whose steps must be small.

    Embeddings are small, so what blocks write into the residual stream must grow slowly beside them; and the attention of
    layer 0 starts out useful (see `Network.initialize`), which full orthogonal steps would undo before it is used.
    """
    return name.endswith(("o_proj", "down_proj", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"))


def make_optimizers(network: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; Adam for embeddings, norms and routers."""
    named = list(network.named_parameters())
    matrices = {name for name, w in named if w.dim() > 1 and "embed" not in name and "router" not in name}
    return [
        Muon([w for name, w in named if name in matrices and not is_slow(name)], lr=muon_lr),
        Muon([w for name, w in named if name in matrices and is_slow(name)], lr=muon_lr * SLOW_SHARE),
        torch.optim.Adam([w for name, w in named if name not in matrices], lr=adam_lr, betas=(0.9, 0.99)),
    ]
