"""The ERNIE 4.5 decoder: embedding, pre-norm layers of attention and feed-forward or mixture of experts, logits.

It reads like the paper (ERNIE 4.5 Technical Report, section 2); what a batch is, and where keys and values live, is in
StepPlan and KvPool, and which part of it this rank has in workers.model.parallel.layout. Shapes: T rows of a step, D hidden, H query heads, K key-value heads, C channels of a head, V
vocabulary, R rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.model.checkpoint.ernie_config import ErnieConfig, MoeConfig
from workers.model.checkpoint.weights import Checkpoint, give_back_free_memory
from workers.model.decoder.attention import attend
from workers.model.decoder.kv_tensors import KvPool
from workers.model.decoder.layers import FeedForward, Linear, RMSNorm, RotaryEmbedding, rotate
from workers.model.decoder.moe import ExpertRouter, MixtureOfExperts
from workers.model.decoder.step_plan import StepPlan, plan_step
from workers.model.parallel.collectives import Links, Stages, add_up, finish, finish_both
from workers.model.parallel.expert_dispatch import AllToAll, ExpertTable
from workers.model.parallel.expert_placement import Placement
from workers.model.parallel.layout import SINGLE, Layout
from workers.model.parallel.vocabulary import embed_share, gather_logits, most_likely
from workers.runner import Batch, LayerHook

Take = Callable[..., Tensor]
"""take(name below a prefix, *shape) gives a weight in the model's dtype."""


@dataclass(frozen=True, slots=True)
class Layer:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    input_norm: RMSNorm
    qkv: Linear
    output: Linear
    post_attention_norm: RMSNorm
    mlp: FeedForward | MixtureOfExperts

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, *self.mlp.linears)


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one rank of a group has of a model: its place, its process groups, the experts' slots."""

    layout: Layout = SINGLE
    links: Links = field(default_factory=Links)
    placement: Placement | None = None
    exact_combine: bool = True


class Ernie:
    """A text model with its weights packed in `dtype`; of a group of ranks, one rank's part of it."""

    def __init__(
        self,
        config: ErnieConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        max_len: int,
        part: RankPart | None = None,
    ) -> None:
        """Takes its share of every weight in turn. Raises InvalidConfig when one is missing, misshapen or unknown."""
        self.config = config
        part = part or RankPart()
        self._layout, self._links = part.layout, part.links
        self._dtype = dtype
        self._rope = RotaryEmbedding(config.head_dim, config.rope_theta, max_len)
        V, D = config.vocab_size, config.hidden_size
        rows = part.layout.share(V)
        self._first_token = rows.first
        name = "model.embed_tokens.weight"
        stored_dtype = min(checkpoint.stored_dtype(name), dtype, key=lambda kind: kind.itemsize)
        # kept apart from the file, narrow: rows are widened when they are looked up
        self._embedding_VD = checkpoint.take_share(name, (V, D), stored_dtype, 0, rows.first, rows.count).clone()
        loader = Loader(config, checkpoint, dtype, part)
        layers = []
        for index in range(config.num_layers):
            layers.append(loader.layer(index))
            give_back_free_memory()
        self._layers = tuple(layers)
        self._norm = RMSNorm(checkpoint.take("model.norm.weight", (D,), dtype).clone(), config.rms_norm_eps)
        head = name if config.tie_word_embeddings else "lm_head.weight"
        self._head = Linear(checkpoint.take_share(head, (V, D), dtype, 0, rows.first, rows.count))
        checkpoint.require_all_taken(unused=("lm_head.weight",) if config.tie_word_embeddings else ())

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*(linear for layer in self._layers for linear in layer.linears), self._head)

    @property
    def links(self) -> Links:
        return self._links

    @property
    def mixtures(self) -> tuple[MixtureOfExperts, ...]:
        """The mixture layers, in order."""
        return tuple(layer.mlp for layer in self._layers if isinstance(layer.mlp, MixtureOfExperts))

    def compute(self, batch: Batch, pool: KvPool, on_layer: LayerHook | None = None) -> Tensor:
        """Runs the layers over a batch, writes KV, returns hidden states [T, D] for `logits`."""
        return finish(self.stages(self._plan(batch, pool), pool, on_layer))

    def compute_halves(self, first: Batch, second: Batch, pool: KvPool) -> Tensor:
        """As `compute` for the rows of `first` and then `second`; one half computes while the other's rows travel.

        Only where attention is not tensor-parallel: then a half without rows has as many stages as any other, so all
        ranks start their group operations in the same order.
        """
        plans = [self._plan(batch, pool) for batch in (first, second)]
        return torch.cat(finish_both(*(self.stages(plan, pool) for plan in plans)))

    def _plan(self, batch: Batch, pool: KvPool) -> StepPlan | None:
        if not batch.prefill and not batch.decode:
            return None
        plan = plan_step(batch, pool)
        if len(plan.fresh_blocks):
            pool.clear(plan.fresh_blocks)
        return plan

    def forward(self, plan: StepPlan, pool: KvPool, on_layer: LayerHook | None = None) -> Tensor:
        """Hidden states [T, D] after the last layer; keys and values of all rows are in the pool afterwards."""
        return finish(self.stages(plan, pool, on_layer))

    def stages(self, plan: StepPlan | None, pool: KvPool, on_layer: LayerHook | None = None) -> Stages[Tensor]:
        """As `forward`; without a plan this rank has no rows, and takes part in what the others compute."""
        H, K = (self._layout.share(count).count for count in (self.config.num_heads, self.config.num_kv_heads))
        C = self.config.head_dim
        x_TD = yield from self._embed(plan)
        rotation = None if plan is None else self._rope.at(plan.positions_T)
        for index, layer in enumerate(self._layers):
            if plan is not None and rotation is not None:
                qkv_THC = layer.qkv(layer.input_norm(x_TD)).view(-1, H + 2 * K, C)
                q_THC, k_TKC = torch.split(rotate(qkv_THC[:, : H + K], rotation), [H, K], dim=1)
                pool.write(index, plan.slots, torch.cat((k_TKC, qkv_THC[:, H + K :]), dim=1))
                if on_layer is not None and (index + 1) % on_layer.every == 0 and index + 1 < len(self._layers):
                    on_layer.call(index + 1)
                attended_TD = layer.output(attend(q_THC, pool, index, plan).to(self._dtype))
                x_TD = x_TD + (yield from self._sum(attended_TD))
            normed_TD = layer.post_attention_norm(x_TD)
            if isinstance(layer.mlp, MixtureOfExperts):
                x_TD = x_TD + (yield from layer.mlp.stages(normed_TD))
            elif plan is not None:
                x_TD = x_TD + (yield from self._sum(layer.mlp(normed_TD)))
        return x_TD

    def _embed(self, plan: StepPlan | None) -> Stages[Tensor]:
        if plan is None:
            return torch.empty(0, self.config.hidden_size, dtype=self._dtype)
        x_TD = yield from embed_share(
            self._links, self._layout, self._embedding_VD, self._first_token, plan.token_ids_T
        )
        return x_TD.to(self._dtype)

    def _sum(self, x_TD: Tensor) -> Stages[Tensor]:
        """Adds what the ranks that share these rows computed of them."""
        if self._layout.tensor == 1:
            return x_TD
        total_TD = yield from add_up(self._links, x_TD)
        return total_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of hidden states. Ranks that share sequences call it together."""
        return finish(gather_logits(self._links, self._layout, self._head(self._norm(x_RD)).float()))

    def greedy(self, x_RD: Tensor) -> list[int]:
        """The most likely token of each row, of equals the lowest."""
        return finish(most_likely(self._links, self._layout, self._head(self._norm(x_RD)).float()))


class Loader:
    """Takes one rank's share of each weight from a checkpoint."""

    def __init__(self, config: ErnieConfig, checkpoint: Checkpoint, dtype: torch.dtype, part: RankPart) -> None:
        self._config, self._checkpoint, self._dtype, self._part = config, checkpoint, dtype, part

    def layer(self, index: int) -> Layer:
        config, checkpoint = self._config, self._checkpoint
        share = self._part.layout.share

        def take(name: str, *shape: int, exact: bool = False) -> Tensor:
            kind = torch.float32 if exact else self._dtype
            return checkpoint.take(f"model.layers.{index}.{name}", shape, kind)

        def cut(name: str, dim: int, total: int, unit: int, other: int) -> Tensor:
            part = share(total)
            if part.is_whole:
                return take(name, *((total * unit, other) if dim == 0 else (other, total * unit)))
            shape = (total * unit, other) if dim == 0 else (other, total * unit)
            return checkpoint.take_share(
                f"model.layers.{index}.{name}", shape, self._dtype, dim, part.first * unit, part.count * unit
            )

        D, C = config.hidden_size, config.head_dim
        heads = (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads))
        moe = config.moe if config.moe is not None and config.moe.has_layer(index) else None
        mlp: FeedForward | MixtureOfExperts
        if moe is None:
            width = config.intermediate_size
            gate, up = (cut(f"mlp.{part}_proj.weight", 0, width, 1, D) for part in ("gate", "up"))
            mlp = FeedForward(gate, up, cut("mlp.down_proj.weight", 1, width, 1, D))
        else:
            mlp = self._mixture(take, moe, index)
        return Layer(
            input_norm=RMSNorm(take("input_layernorm.weight", D).clone(), config.rms_norm_eps),
            qkv=Linear(torch.cat([cut(f"self_attn.{part}_proj.weight", 0, count, C, D) for part, count in heads])),
            output=Linear(cut("self_attn.o_proj.weight", 1, config.num_heads, C, D)),
            post_attention_norm=RMSNorm(take("post_attention_layernorm.weight", D).clone(), config.rms_norm_eps),
            mlp=mlp,
        )

    def _mixture(self, take: Take, moe: MoeConfig, index: int) -> MixtureOfExperts:
        D, E, width = self._config.hidden_size, moe.num_experts, moe.intermediate_size
        part = self._part
        bias_1E = take("mlp.moe_statics.e_score_correction_bias", 1, E, exact=True).clone()
        router = ExpertRouter(
            take("mlp.gate.weight", E, D, exact=True), bias_1E[0], moe.num_experts_per_token, moe.norm_min
        )
        num_shared = moe.num_shared_experts
        shared = _load_feed_forward(take, "mlp.shared_experts", D, width * num_shared) if num_shared else None
        if part.layout.size == 1 or part.placement is None:
            experts = [_load_feed_forward(take, f"mlp.experts.{expert}", D, width) for expert in range(E)]
            return MixtureOfExperts(router, experts, shared)
        layer = mixture_index(moe, index)
        held = part.placement.held_by(layer, part.layout.rank)
        for expert in sorted(set(range(E)) - set(held)):
            for name, shape in (("gate", (width, D)), ("up", (width, D)), ("down", (D, width))):
                self._checkpoint.skip(f"model.layers.{index}.mlp.experts.{expert}.{name}_proj.weight", shape)
        table = ExpertTable(part.placement.layers[layer], E, part.layout.size, torch.device("cpu"))
        exchange = AllToAll(part.links, table, part.exact_combine)
        return MixtureOfExperts(
            router,
            [_load_feed_forward(take, f"mlp.experts.{expert}", D, width) for expert in held],
            shared,
            exchange,
            part.layout,
            part.links,
        )


def mixture_index(moe: MoeConfig, layer: int) -> int:
    """Which of the mixture layers, counted from 0, layer `layer` of the model is."""
    return sum(moe.has_layer(before) for before in range(layer))


def _load_feed_forward(take: Take, prefix: str, D: int, width: int) -> FeedForward:
    return FeedForward(
        take(f"{prefix}.gate_proj.weight", width, D),
        take(f"{prefix}.up_proj.weight", width, D),
        take(f"{prefix}.down_proj.weight", D, width),
    )
