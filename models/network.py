"""The ERNIE 4.5 MoE decoder as a compact training module; it knows nothing of data, optimizers or files.

Shapes: B rows, T tokens of a row, N = B*T tokens, D hidden, H query heads, K key-value heads, C head dimension,
E experts, M width of one expert. Weights are kept in fp32; matrix products run in `compute_dtype`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_STD = 0.1
CONSTANT = 0.5
WINDOWS = (3, 5, 1, 2)  # distance in tokens that each head of layer 0 starts with
WINDOW_SHARPNESS = 7.7
TWIN_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The dimensions; field names are those of the published config.json."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    moe_num_experts: int = 8
    moe_k: int = 2
    moe_num_shared_experts: int = 1
    moe_intermediate_size: int = 128
    moe_layer_start_index: int = 1
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    moe_norm_min: float = 1e-12
    max_position_embeddings: int = 8192


def rotary_table(config: NetworkConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, C/2] of every position and pair of channels."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), config.rope_theta**-exponents)
    return angles.cos(), angles.sin()


def rotate(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over interleaved pairs of channels (2i, 2i+1), in fp32."""
    even, odd = x_BTHC.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x_BTHC.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [B, H, T, C]; short bf16 rows by plain products, which a CPU does faster than the fused kernel."""
    T = q.shape[2]
    if q.dtype != torch.bfloat16 or T > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    return torch.softmax(scores + torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1), dim=-1) @ v


class RMSNorm(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        D, C = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Parameter(torch.empty(H * C, D))
        self.k_proj = nn.Parameter(torch.empty(K * C, D))
        self.v_proj = nn.Parameter(torch.empty(K * C, D))
        self.o_proj = nn.Parameter(torch.empty(D, H * C))

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        C = self.config.head_dim
        weight = torch.cat((self.q_proj, self.k_proj, self.v_proj)).to(x_BTD.dtype)
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = F.linear(x_BTD, weight).unflatten(-1, (H + 2 * K, C))
        rotated = rotate(qkv[:, :, : H + K], cos, sin)
        q, k, v = rotated[:, :, :H], rotated[:, :, H:], qkv[:, :, H + K :]
        k, v = k.repeat_interleave(H // K, dim=2), v.repeat_interleave(H // K, dim=2)
        y = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return F.linear(y.transpose(1, 2).flatten(-2), self.o_proj.to(x_BTD.dtype))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(width, hidden))
        self.up_proj = nn.Parameter(torch.empty(width, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat((self.gate_proj, self.up_proj)).to(x.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj.to(x.dtype))


class MixtureOfExperts(nn.Module):
    """Top-k routed experts beside ungated shared ones; a bias that only selection sees keeps the load even."""

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        D, E, M = config.hidden_size, config.moe_num_experts, config.moe_intermediate_size
        self.router = nn.Parameter(torch.empty(E, D))
        self.gate_proj = nn.Parameter(torch.empty(E, M, D))
        self.up_proj = nn.Parameter(torch.empty(E, M, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, M))
        self.shared_experts = FeedForward(D, M * config.moe_num_shared_experts)
        self.register_buffer("bias_E", torch.zeros(E))
        self.register_buffer("load_E", torch.zeros(E), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        E, k = self.config.moe_num_experts, self.config.moe_k
        scores_NE = torch.softmax(F.linear(x_ND.float(), self.router), dim=-1)
        chosen_Nk = torch.topk(scores_NE.detach() + self.bias_E, k, dim=-1).indices
        weights_Nk = scores_NE.gather(-1, chosen_Nk)
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True).clamp(min=self.config.moe_norm_min)

        flat = chosen_Nk.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=E)
        self.load_E += counts
        gate_up = torch.cat((self.gate_proj, self.up_proj), dim=1).to(x_ND.dtype).unbind()
        down = self.down_proj.to(x_ND.dtype).unbind()
        outputs = []
        for e, rows in enumerate(x_ND.index_select(0, order // k).split(counts.tolist())):
            gate, up = F.linear(rows, gate_up[e]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down[e]))
        routed = torch.cat(outputs).float() * weights_Nk.flatten().index_select(0, order)[:, None]
        y_ND = self.shared_experts(x_ND).float().index_add(0, order // k, routed)
        return y_ND.view(x_BTD.shape)

    @torch.no_grad()
    def balance(self, rate: float) -> float:
        """Moves the bias against the load since the last call; returns the largest load over the mean."""
        mean = self.load_E.mean()
        self.bias_E += rate * torch.sign(mean - self.load_E)
        self.bias_E -= self.bias_E.mean()
        imbalance = float(self.load_E.max() / mean)
        self.load_E.zero_()
        return imbalance


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        is_dense = index < config.moe_layer_start_index
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size) if is_dense else MixtureOfExperts(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD).to(dtype), cos, sin).float()
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD).to(dtype)).float()


class Network(nn.Module):
    """Tokens in, logits of the asked positions out."""

    def __init__(self, config: NetworkConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.cos, self.sin = rotary_table(config, config.max_position_embeddings)

    def initialize(self, seed: int, twins: Sequence[tuple[int, int]] = ()) -> None:
        """Draws all weights; the tokens of each pair of `twins` start with nearly the same embedding."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                std = weight.shape[-1] ** -0.5
                if "embed" in name:
                    std = EMBEDDING_STD
                elif "router" in name:
                    std = 0.02
                elif "o_proj" in name or "down_proj" in name:
                    std = 0.0  # each block starts as the identity, so deeper layers see tokens from the first step
                nn.init.normal_(weight, std=std, generator=generator)
        with torch.no_grad():
            for token, twin in twins:
                own = self.embed_tokens[twin] * (1 - TWIN_SHARE) ** 0.5
                self.embed_tokens[twin] = self.embed_tokens[token] * TWIN_SHARE**0.5 + own
        self._initialize_heads()
        self._initialize_offsets()

    @torch.no_grad()
    def _initialize_heads(self) -> None:
        """Starts all heads as copying heads, and those above layer 0 as looking for tokens like their own.

        An output projection that is the transpose of the value projection writes what a head reads back into the
        residual stream, where the tied embedding can name it; equal query and key projections score likeness.
        """
        C, group = self.config.head_dim, self.config.num_attention_heads // self.config.num_key_value_heads
        for index, layer in enumerate(self.layers):
            attention = layer.self_attn
            attention.o_proj.copy_(
                EMBEDDING_STD * attention.v_proj.unflatten(0, (-1, C)).repeat_interleave(group, 0).flatten(0, 1).T
            )
            if index > 0:
                likeness = attention.k_proj.unflatten(0, (-1, C)).repeat_interleave(group, 0).flatten(0, 1)
                attention.q_proj.add_(likeness).mul_(0.5**0.5)  # part of it random: heads of a group must differ

    @torch.no_grad()
    def _initialize_offsets(self) -> None:
        """Starts the heads of layer 0 as windows that look back by a fixed distance.

        Copying needs heads that know what stood a few tokens before; found by chance they cost most of a small training
        run. All embeddings share one constant channel, from which queries and keys draw vectors that agree best at the
        wanted distance under the rotary embedding. Training is free to change everything.
        """
        C, first = self.config.head_dim, self.layers[0].self_attn
        pairs = 5  # the fast ones, that tell neighbours apart
        angles = self.config.rope_theta ** -(torch.arange(pairs) * 2 / C)
        self.embed_tokens[:, 0] = CONSTANT
        length = (EMBEDDING_STD**2 + CONSTANT**2 / self.config.hidden_size) ** 0.5
        unit = length / CONSTANT
        for head in range(self.config.num_key_value_heads):
            first.k_proj[head * C : head * C + 2 * pairs : 2, 0] += WINDOW_SHARPNESS * unit
        for head, distance in enumerate(WINDOWS[: self.config.num_attention_heads]):
            rows = first.q_proj[head * C : head * C + 2 * pairs, 0]
            rows[0::2] += WINDOW_SHARPNESS * unit * torch.cos(distance * angles)
            rows[1::2] -= WINDOW_SHARPNESS * unit * torch.sin(distance * angles)

    def forward(self, tokens_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [P, vocabulary] of the given flat positions, or of all."""
        x_BTD = F.embedding(tokens_BT, self.embed_tokens)
        T = tokens_BT.shape[1]
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.cos[:T], self.sin[:T], self.compute_dtype)
        x_ND = x_BTD.flatten(0, 1)
        if positions is not None:
            x_ND = x_ND.index_select(0, positions)
        return F.linear(self.norm(x_ND).to(self.compute_dtype), self.embed_tokens.to(self.compute_dtype)).float()

    def mixtures(self) -> list[MixtureOfExperts]:
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
