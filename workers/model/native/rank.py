"""One rank's part of the decoder on the C++ kernels; has the face of workers.model.decoder.ernie.Ernie in a group.

Each call of the kernels computes all that lies between two group operations, which stay those of every other rank. What a
call leaves in the kernels' memory is not looked at by the next one, so that two halves of a step may take turns.

Shapes: T rows of a step, D hidden, R rows that are sampled, k experts of a token, M rows that arrived at this rank's experts,
S its slots, B assignments that arrived.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.decoder.ernie import RankPart as RankPart
from workers.model.decoder.kv_tensors import KvPool
from workers.model.decoder.moe import share_rows
from workers.model.native.ernie import NativeErnie, NativePlan
from workers.model.native.library import Library, SlotWork
from workers.model.parallel.collectives import Links, Stages, add_up, finish, finish_both
from workers.model.parallel.expert_dispatch import AllToAll, ExpertTable
from workers.model.parallel.vocabulary import best_of_shares, gather_logits
from workers.runner import Batch, LayerHook


class NativeRank(NativeErnie):
    """One rank's heads, columns, vocabulary rows and experts, packed in `dtype` in the kernels' memory."""

    def __init__(
        self,
        config: ErnieConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        library: Library,
        num_threads: int,
        part: RankPart,
    ) -> None:
        layout, placement = part.layout, part.placement
        num_mixtures = 0 if placement is None else len(placement.layers)
        held = [placement.held_by(layer, layout.rank) for layer in range(num_mixtures)] if placement else None
        super().__init__(config, checkpoint, dtype, library, num_threads, layout, held)
        self._links = part.links
        moe = config.moe
        places = [] if moe is None else [at for at in range(config.num_layers) if moe.has_layer(at)]
        self._mixtures = {layer: NativeMixture(self, layer, at, part) for at, layer in enumerate(places)}

    @property
    def links(self) -> Links:
        return self._links

    @property
    def mixtures(self) -> tuple[NativeMixture, ...]:
        """The mixture layers, in order."""
        return tuple(self._mixtures.values())

    def compute(self, batch: Batch, pool: KvPool, on_layer: LayerHook | None = None) -> Tensor:
        """As Ernie's; with an empty batch this rank takes part in what the others compute."""
        return finish(self._stages(batch, pool, on_layer))

    def compute_halves(self, first: Batch, second: Batch, pool: KvPool) -> Tensor:
        """As Ernie's."""
        return torch.cat(finish_both(*(self._stages(batch, pool) for batch in (first, second))))

    def logits(self, x_RD: Tensor) -> Tensor:
        return finish(gather_logits(self._links, self._layout, super().logits(x_RD)))

    def greedy(self, x_RD: Tensor) -> list[int]:
        return finish(best_of_shares(self._links, self._layout, *self._head(x_RD), self._num_tokens))

    def _stages(self, batch: Batch, pool: KvPool, on_layer: LayerHook | None = None) -> Stages[Tensor]:
        plan = self._plan(batch, pool) if batch.prefill or batch.decode else None
        x_TD = yield from self._embed(plan)
        for layer in range(self.config.num_layers):
            if plan is not None:
                yield from self._attend(plan, layer, pool, x_TD)
                if on_layer is not None and (layer + 1) % on_layer.every == 0 and layer + 1 < self.config.num_layers:
                    on_layer.call(layer + 1)
            if layer in self._mixtures:
                x_TD += yield from self._mixtures[layer].stages(x_TD)
            elif plan is not None:
                yield from self._feed_forward(layer, x_TD)
        return x_TD

    def _embed(self, plan: NativePlan | None) -> Stages[Tensor]:
        x_TD = torch.empty(0 if plan is None else plan.num_rows, self.config.hidden_size, dtype=self._dtype)
        if plan is None:
            return x_TD
        self._library.begin(self._model, plan.step, x_TD.data_ptr())
        if self._layout.tensor > 1:  # every row is zero but on one rank
            x_TD = yield from add_up(self._links, x_TD)
        return x_TD.contiguous()

    def _attend(self, plan: NativePlan, layer: int, pool: KvPool, x_TD: Tensor) -> Stages[None]:
        part_TD = self._part_of(x_TD)
        self._library.attend(self._model, plan.step, layer, pool.address, x_TD.data_ptr(), _address(part_TD))
        yield from self._add(x_TD, part_TD)

    def _feed_forward(self, layer: int, x_TD: Tensor) -> Stages[None]:
        part_TD = self._part_of(x_TD)
        self._library.feed_forward(self._model, layer, len(x_TD), x_TD.data_ptr(), _address(part_TD))
        yield from self._add(x_TD, part_TD)

    def _part_of(self, x_TD: Tensor) -> Tensor | None:
        """Where the kernels put what is to be added up over ranks; None: they add to x by themselves."""
        return None if self._layout.tensor == 1 else torch.empty_like(x_TD)

    def _add(self, x_TD: Tensor, part_TD: Tensor | None) -> Stages[None]:
        if part_TD is not None:
            x_TD += yield from add_up(self._links, part_TD)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeMixture:
    """Implements workers.model.parallel.rank_experts.Mixture: a mixture layer whose experts are those of this rank's slots."""

    def __init__(self, rank: NativeRank, layer: int, index: int, part: RankPart) -> None:
        """Layer `layer` of the model, the `index`-th with a mixture."""
        moe = rank.config.moe
        assert moe is not None and part.placement is not None
        self._library, self._model, self._dtype = rank._library, rank._model, rank._dtype
        self._layer, self._layout, self._links = layer, part.layout, part.links
        self._num_choices, self._has_shared = moe.num_experts_per_token, bool(moe.num_shared_experts)
        self._expert_bytes = 3 * moe.intermediate_size * rank.config.hidden_size * self._dtype.itemsize
        table = ExpertTable(part.placement.layers[index], moe.num_experts, part.layout.size, torch.device("cpu"))
        self.exchange = AllToAll(part.links, table, part.exact_combine, self._add_choices)
        self.load_E: Tensor | None = None

    def stages(self, x_TD: Tensor) -> Stages[Tensor]:
        """What the layer adds to x; a rank without rows takes part all the same."""
        y_TD = yield from share_rows(x_TD, self._layout, self._links, self._compute)
        return y_TD

    def _compute(self, x_TD: Tensor) -> Stages[Tensor]:
        library, model, layer, num_rows = self._library, self._model, self._layer, len(x_TD)
        normed_TD = torch.empty_like(x_TD)
        weights_Tk = torch.empty(num_rows, self._num_choices)
        experts_Tk = torch.empty(num_rows, self._num_choices, dtype=torch.int64)
        addresses = (normed_TD.data_ptr(), weights_Tk.data_ptr(), experts_Tk.data_ptr())
        library.route(model, layer, num_rows, x_TD.data_ptr(), *addresses)
        if self.load_E is not None:
            self.load_E += torch.bincount(experts_Tk.flatten(), minlength=len(self.load_E))
        travel = yield from self.exchange.dispatch(normed_TD, weights_Tk, experts_Tk)
        shared_TD = None
        if self._has_shared:  # while the rows travel
            shared_TD = torch.empty_like(x_TD)
            library.run_shared(model, layer, num_rows, normed_TD.data_ptr(), shared_TD.data_ptr())
        rows_MD, ends_S, arrival = yield from self.exchange.receive(travel)
        ends_S, source_B = ends_S.long(), arrival.row_B[arrival.sorted_B]
        outputs_BD = rows_MD.new_empty(len(source_B), rows_MD.shape[1])
        work = SlotWork(len(rows_MD), ends_S.data_ptr(), source_B.data_ptr(), arrival.sorted_B.data_ptr())
        library.run_slots(model, layer, work, rows_MD.data_ptr(), outputs_BD.data_ptr())
        y_TD = yield from self.exchange.bring_home(outputs_BD, weights_Tk, arrival, shared_TD)
        return y_TD

    def _add_choices(self, home_AD: Tensor, place_A: Tensor, weights_Tk: Tensor, shared_TD: Tensor | None) -> Tensor:
        """Implements workers.model.parallel.expert_dispatch.Add, with the additions of one rank alone."""
        total_TD = home_AD.new_empty(len(weights_Tk), home_AD.shape[1])
        addresses = (home_AD.data_ptr(), place_A.data_ptr(), weights_Tk.data_ptr())
        self._library.combine(self._model, len(weights_Tk), *addresses, _address(shared_TD), total_TD.data_ptr())
        return total_TD

    def use_table(self, table: ExpertTable) -> None:
        self.exchange.table = table

    def expert_bytes(self, slot: int) -> Tensor:
        blob = torch.empty(self._expert_bytes, dtype=torch.uint8)
        self._library.give(self._model, self._layer, slot, blob.data_ptr())
        return blob

    def rearrange(self, sources: Sequence[int | Tensor]) -> None:
        slots = np.array([source if isinstance(source, int) else -1 for source in sources], dtype=np.int64)
        blobs = [None if isinstance(source, int) else source.contiguous() for source in sources]
        given = (ctypes.c_void_p * len(blobs))(*(None if blob is None else blob.data_ptr() for blob in blobs))
        self._library.rearrange(self._model, self._layer, slots.ctypes.data, ctypes.addressof(given))
