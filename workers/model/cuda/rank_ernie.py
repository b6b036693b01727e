"""One rank's part of the decoder on a CUDA device: heads, columns and vocabulary of its share, its experts, and group operations.

What workers.model.decoder.ernie does for a group on the CPU, in the kernels of workers.model.cuda.ernie. Shapes: T rows, D hidden,
H query heads, V vocabulary, R rows that are sampled, S expert slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workers.model.checkpoint.ernie_config import ErnieConfig, MoeConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.cuda.device_pool import DevicePool
from workers.model.cuda.ernie import CudaErnie, Loader
from workers.model.cuda.kernels.experts import choose_experts, combine
from workers.model.cuda.kernels.rows import add_norm, rotate_and_store
from workers.model.cuda.layers import Experts, FeedForward, Linear, MixtureOfExperts
from workers.model.cuda.step_inputs import StepInputs
from workers.model.decoder.ernie import RankPart, mixture_index
from workers.model.decoder.moe import share_rows
from workers.model.parallel.collectives import Links, Stages, add_up, finish
from workers.model.parallel.direct_dispatch import DirectAllToAll, DirectBuffers
from workers.model.parallel.expert_dispatch import AllToAll, Exchange, ExpertTable
from workers.model.parallel.layout import Layout
from workers.model.parallel.vocabulary import embed_share, gather_logits, most_likely


class RankMixture(MixtureOfExperts):
    """As MixtureOfExperts, with the experts of this rank's slots alone; rows go to where the others are.

    Ranks that share sequences bring a part of the rows each; a rank that has no rows takes part all the same.
    """

    def __init__(
        self,
        router: Linear,
        bias_E: Tensor,
        moe: MoeConfig,
        experts: Experts,
        shared: FeedForward | None,
        exchange: AllToAll,
        layout: Layout,
        links: Links,
    ) -> None:
        super().__init__(router, bias_E, moe.num_experts_per_token, moe.norm_min, experts, shared)
        self._portable, self._layout, self._links = exchange, layout, links
        self._exchange: Exchange = exchange
        self._direct: DirectAllToAll | None = None
        self._last_expert = moe.num_experts - 1
        self.load_E: Tensor | None = None
        """Counts the tokens that chose each expert, where somebody asks for it."""

    def stages(self, x_TD: Tensor, is_decode: bool) -> Stages[Tensor]:
        y_TD = yield from share_rows(x_TD, self._layout, self._links, lambda mine: self._compute(mine, is_decode))
        return y_TD

    def use_table(self, table: ExpertTable) -> None:
        """Experts are where `table` says from now on."""
        self._portable.table = table
        if self._direct is not None:
            self._direct.table = table

    def use_buffers(self, buffers: DirectBuffers | None) -> None:
        """Rows travel through these buffers from now on; None: as torch.distributed brings them."""
        self._direct = None
        if buffers is not None:
            self._direct = DirectAllToAll(self._links, self._portable.table, buffers, combine)
        self._exchange = self._direct or self._portable

    def expert_bytes(self, slot: int) -> Tensor:
        return self._experts.bytes_of(slot)

    def rearrange(self, sources: Sequence[int | Tensor]) -> None:
        self._experts.rearrange(sources)

    def _compute(self, x_TD: Tensor, is_decode: bool) -> Stages[Tensor]:
        scores_TE = self._router(x_TD.float(), is_decode)
        weights_Tk, chosen_Tk = choose_experts(scores_TE, self._bias_E, self._num_choices, self._norm_min)
        # what an aborted operation leaves may be anything, and an index beyond its table would fault the device
        experts_Tk = chosen_Tk.long().clamp_(0, self._last_expert)
        if self.load_E is not None:
            chosen_A = experts_Tk.flatten()
            self.load_E.scatter_add_(0, chosen_A, torch.ones_like(chosen_A))
        receipt = yield from self._exchange.dispatch(x_TD, weights_Tk, experts_Tk)
        shared_TD = None if self._shared is None else self._shared(x_TD, is_decode)  # while the rows travel
        sent = yield from self._exchange.arrive(receipt)
        outputs_AD = self._experts.run(sent.rows_AD, sent.ends_E, is_decode)
        y_TD = yield from self._exchange.combine(outputs_AD, weights_Tk, sent.receipt, shared_TD)
        return y_TD


class RankErnie(CudaErnie):
    """A rank's part of a text model. `config` is the part's: with this rank's heads alone."""

    def __init__(
        self,
        config: ErnieConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        max_len: int,
        device: torch.device,
        deterministic: bool,
        part: RankPart,
    ) -> None:
        heads, kv_heads = (part.layout.share(count).count for count in (config.num_heads, config.num_kv_heads))
        mine = replace(config, num_heads=heads, num_kv_heads=kv_heads)
        loader = RankLoader(config, checkpoint, dtype, device, deterministic, part)
        super().__init__(mine, checkpoint, dtype, max_len, device, deterministic, loader)
        self._layout, self.links = part.layout, part.links
        self._first_token = part.layout.share(config.vocab_size).first

    @property
    def mixtures(self) -> tuple[RankMixture, ...]:
        """The mixture layers, in order."""
        return tuple(layer.mlp for layer in self._layers if isinstance(layer.mlp, RankMixture))

    def stages(self, inputs: StepInputs | None, pool: DevicePool, is_decode: bool) -> Stages[Tensor]:
        """As `forward`, for rows that all decode or all prefill, on every rank. Without inputs this rank has none of them,
        and takes part in what the others compute."""
        eps = self.config.rms_norm_eps
        x_TD = yield from self._embed(inputs)
        y_TD: Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed_TD = x_TD
            if inputs is not None:
                layer_pool = pool.layer(index)
                x_TD, normed_TD = add_norm(x_TD, y_TD, layer.input_norm_D, eps)
                qkv_TX = layer.qkv(normed_TD, is_decode)
                q_THC = rotate_and_store(qkv_TX, self._rotation, inputs.rows, layer_pool, self.config.num_heads)
                y_TD = yield from self._sum(layer.output(self._attend(q_THC, layer_pool, inputs), is_decode))
                x_TD, normed_TD = add_norm(x_TD, y_TD, layer.post_attention_norm_D, eps)
            if isinstance(layer.mlp, RankMixture):
                y_TD = yield from layer.mlp.stages(normed_TD, is_decode)
            elif inputs is not None:
                y_TD = yield from self._sum(layer.mlp(normed_TD, is_decode))
        return x_TD if y_TD is None else x_TD + y_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of hidden states. Ranks that share sequences call it together."""
        return finish(gather_logits(self.links, self._layout, super().logits(x_RD)))

    def greedy(self, x_RD: Tensor) -> list[int]:
        """The most likely token of each row; of equals the lowest id."""
        return finish(most_likely(self.links, self._layout, super().logits(x_RD)))

    def _embed(self, inputs: StepInputs | None) -> Stages[Tensor]:
        if inputs is None:
            return self._embedding_VD[:0]
        x_TD = yield from embed_share(
            self.links, self._layout, self._embedding_VD, self._first_token, inputs.rows[:, 0].long()
        )
        return x_TD

    def _sum(self, x_TD: Tensor) -> Stages[Tensor]:
        """Adds what the ranks that share these rows computed of them."""
        if self._layout.tensor == 1:
            return x_TD
        total_TD = yield from add_up(self.links, x_TD)
        return total_TD


class RankLoader(Loader):
    """Takes one rank's share of each weight from a checkpoint."""

    def __init__(
        self,
        config: ErnieConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool,
        part: RankPart,
    ) -> None:
        super().__init__(config, checkpoint, dtype, device, deterministic)
        self._checkpoint, self._part = checkpoint, part

    def cut(self, name: str, dim: int, total: int, unit: int, other: int) -> Tensor:
        share = self._part.layout.share(total)
        if share.is_whole:
            return super().cut(name, dim, total, unit, other)
        shape = (total * unit, other) if dim == 0 else (other, total * unit)
        first, count = share.first * unit, share.count * unit
        return self._checkpoint.take_share(name, shape, self._dtype, dim, first, count).to(self._device)

    def mixture(self, index: int, moe: MoeConfig) -> MixtureOfExperts:
        part, E = self._part, moe.num_experts
        assert part.placement is not None
        layer = mixture_index(moe, index)
        held = part.placement.held_by(layer, part.layout.rank)
        D, F = self._config.hidden_size, moe.intermediate_size
        for expert in sorted(set(range(E)) - set(held)):
            for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                self._checkpoint.skip(f"model.layers.{index}.mlp.experts.{expert}.{name}_proj.weight", shape)
        table = ExpertTable(part.placement.layers[layer], E, part.layout.size, self._device)
        exchange = AllToAll(part.links, table, part.exact_combine, combine)
        experts, shared = self.experts(index, moe, held), self.shared_experts(index, moe)
        return RankMixture(*self.router(index, moe), moe, experts, shared, exchange, part.layout, part.links)
