"""The ERNIE 4.5 decoder on the C++ kernels; has the face of workers.model.decoder.ernie.Ernie.

Shapes: T rows of a step, D hidden, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.decoder.kv_tensors import KvPool
from workers.model.decoder.layers import frequencies
from workers.model.native.build import BuildFailed
from workers.model.native.draw import NativeRowKernel
from workers.model.native.library import Dimensions, Library, StepArguments, WeightPart
from workers.model.native.packed import PackedFile, run_all
from workers.model.parallel.layout import SINGLE, Layout, Share
from workers.runner import BLOCK_SIZE, Batch, LayerHook, SequenceSlice

_JOB_VALUES = 4 << 20
"""A larger matrix is packed by several threads."""


def require_supported(config: ErnieConfig, layout: Layout = SINGLE) -> None:
    """Raises BuildFailed when the kernels' vector width does not divide the model's dimensions, or a rank's share of them."""
    rules = [
        ("head_dim", config.head_dim, 32),
        ("hidden_size", config.hidden_size, 32),
        ("intermediate_size", config.intermediate_size, 2 * layout.tensor),
    ]
    if config.moe is not None:
        rules.append(("moe_intermediate_size", config.moe.intermediate_size, 2))
    for name, value, divisor in rules:
        if value % divisor:
            raise BuildFailed(f"the C++ kernels need a {name} that is a multiple of {divisor}; it is {value}")


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A batch as the kernels take it."""

    step: StepArguments
    arrays: tuple[Any, ...]
    """What the step has addresses of."""

    @property
    def num_rows(self) -> int:
        rows: int = self.step.num_rows
        return rows


class NativeErnie:
    """A text model with its weights packed in `dtype` in the kernels' memory."""

    def __init__(
        self,
        config: ErnieConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        library: Library,
        num_threads: int,
        layout: Layout = SINGLE,
        held: Sequence[Sequence[int]] | None = None,
        packed: PackedFile | None = None,
    ) -> None:
        """Takes every weight of the checkpoint in turn, or a rank's share of it. Raises InvalidConfig when one is missing,
        misshapen or unknown. `held`: the experts in this rank's slots, by mixture layer; all in order when None. `packed`: where
        weights are once they are packed, and what is read instead of the checkpoint when it is there.
        """
        self.config = config
        self._num_threads = num_threads
        self._dtype = dtype
        self._library = library
        self._layout = layout
        self._held = held
        self._num_tokens = layout.share(config.vocab_size).count
        num_slots = len(held[0]) if held else 0 if config.moe is None else config.moe.num_experts
        self._model = library.create(_dimensions(config, num_threads, layout, num_slots), dtype is torch.bfloat16)
        weakref.finalize(self, library.destroy, self._model)
        self.row_kernel = NativeRowKernel(library, self._model)
        self.keeping: threading.Thread | None = None
        """Writes the packed weights, after a load from the checkpoint."""
        if not config.tie_word_embeddings:
            library.take(self._model, WeightPart.HEAD, 0, 0, 0, 0, 0)  # makes room for it
        if packed is not None and packed.read(library.weights(self._model)):
            library.have_all(self._model)
            return
        self._load(checkpoint)
        if packed is not None:
            self.keeping = packed.write_later(library.weights(self._model), self)

    def compute(self, batch: Batch, pool: KvPool, on_layer: LayerHook | None = None) -> Tensor:
        """Hidden states [T, D] after the last layer; keys and values of all rows are in the pool afterwards.

        Raises IndexError where a block table is too short.
        """
        plan = self._plan(batch, pool)
        x_TD = torch.empty(plan.num_rows, self.config.hidden_size, dtype=self._dtype)
        self._library.forward(self._model, plan.step, pool.address, x_TD.data_ptr(), on_layer)
        return x_TD

    def _plan(self, batch: Batch, pool: KvPool) -> NativePlan:
        """Clears the blocks that get their first token. Raises IndexError where a block table is too short."""
        slices = (*batch.prefill, *batch.decode)
        counts = [len(piece.token_ids) for piece in slices]
        num_blocks = [-(-(piece.start + count) // BLOCK_SIZE) for piece, count in zip(slices, counts, strict=True)]
        tables = [piece.block_table[:count] for piece, count in zip(slices, num_blocks, strict=True)]
        if any(len(table) < count for table, count in zip(tables, num_blocks, strict=True)):
            raise IndexError("a block table is too short for its slice")
        fresh = [block for piece in slices if (block := _fresh_block(piece)) is not None]
        if fresh:
            pool.clear(torch.tensor(fresh))
        rows = list(accumulate(counts, initial=0))
        arrays = [
            _int64(chain.from_iterable(piece.token_ids for piece in slices)),
            _int64(chain.from_iterable(range(s.start, s.start + n) for s, n in zip(slices, counts, strict=True))),
            _int64(rows),
            np.concatenate(tables).astype(np.int64),
            _int64(accumulate(num_blocks[:-1], initial=0)),
            *np.empty((2, rows[-1] * self.config.head_dim // 2), dtype=np.float32),
        ]
        sizes = (rows[-1], len(slices), len(arrays[3]), pool.num_blocks, pool.memory_heads)
        return NativePlan(StepArguments(*sizes, *(array.ctypes.data for array in arrays)), tuple(arrays))

    def logits(self, x_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of hidden states."""
        logits_RV = torch.empty(x_RD.shape[0], self._num_tokens)
        self._head(x_RD, logits_RV)
        return logits_RV

    def greedy(self, x_RD: Tensor) -> list[int]:
        """The most likely token of each row, of equals the lowest; writes no logits."""
        tokens: list[int] = self._head(x_RD)[1].tolist()
        return tokens

    def _head(self, x_RD: Tensor, logits_RV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The largest logit of each row, and its place among this rank's tokens, of equals the lowest."""
        x_RD = x_RD.contiguous()
        peaks_R, best_R = torch.empty(x_RD.shape[0]), torch.empty(x_RD.shape[0], dtype=torch.int64)
        address = None if logits_RV is None else logits_RV.data_ptr()
        self._library.head(self._model, x_RD.data_ptr(), x_RD.shape[0], address, best_R.data_ptr(), peaks_R.data_ptr())
        return peaks_R, best_R

    def _load(self, checkpoint: Checkpoint) -> None:
        config, D, C = self.config, self.config.hidden_size, self.config.head_dim
        heads, kv_heads = (self._layout.share(count) for count in (config.num_heads, config.num_kv_heads))
        tokens, columns = (self._layout.share(count) for count in (config.vocab_size, config.intermediate_size))

        def take_vector(part: WeightPart, name: str, *shape: int, layer: int = 0, exact: bool = False) -> None:
            values = checkpoint.take(name, shape, torch.float32 if exact else self._dtype)
            self._library.take(self._model, part, layer, 0, 0, values.numel(), values.data_ptr())

        jobs: list[Callable[[], None]] = []

        def put(part: WeightPart, rows_OI: Tensor, layer: int, expert: int, first: int) -> None:
            self._library.take(self._model, part, layer, expert, first, len(rows_OI), rows_OI.data_ptr())

        def take(
            part: WeightPart,
            name: str,
            share: Share,
            unit: int,
            *,
            layer: int = 0,
            expert: int = 0,
            exact: bool = False,
        ) -> None:
            """Rows of a matrix with D columns, `unit` of them for each element of the share."""
            kind = torch.float32 if exact else self._dtype
            shape = (share.total * unit, D)
            if not share.is_whole:
                checkpoint.skip_rows(name, shape, (share.total - share.count) * unit)

            def pack(start: int, count: int) -> None:
                mine = (share.first * unit + start, count)
                for first, rows in checkpoint.pieces(name, shape, kind, mine):
                    put(part, rows, layer, expert, start + first)

            jobs.extend(partial(pack, *run) for run in _runs(share.count * unit, D))

        def take_columns(part: WeightPart, name: str, share: Share, unit: int, *, layer: int, expert: int = 0) -> None:
            """The same of columns, of a matrix with D rows."""
            mine = slice(share.first * unit, (share.first + share.count) * unit)

            def pack(start: int, count: int) -> None:
                for first, rows in checkpoint.pieces(name, (D, share.total * unit), self._dtype, (start, count)):
                    put(part, rows[:, mine].contiguous(), layer, expert, start + first)

            jobs.extend(partial(pack, *run) for run in _runs(D, share.total * unit))

        def take_mlp(prefix: str, width: Share, layer: int, expert: int) -> None:
            take(WeightPart.GATE, f"{prefix}.gate_proj.weight", width, 1, layer=layer, expert=expert)
            take(WeightPart.UP, f"{prefix}.up_proj.weight", width, 1, layer=layer, expert=expert)
            take_columns(WeightPart.DOWN, f"{prefix}.down_proj.weight", width, 1, layer=layer, expert=expert)

        def skip_mlp(prefix: str, width: int) -> None:
            for name, shape in (("gate", (width, D)), ("up", (width, D)), ("down", (D, width))):
                checkpoint.skip(f"{prefix}.{name}_proj.weight", shape)

        take(WeightPart.EMBEDDING, "model.embed_tokens.weight", tokens, 1)
        num_mixtures = 0
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}"
            take_vector(WeightPart.INPUT_NORM, f"{name}.input_layernorm.weight", D, layer=layer)
            for part, key, share in (
                (WeightPart.QUERY, "q", heads),
                (WeightPart.KEY, "k", kv_heads),
                (WeightPart.VALUE, "v", kv_heads),
            ):
                take(part, f"{name}.self_attn.{key}_proj.weight", share, C, layer=layer)
            take_columns(WeightPart.OUTPUT, f"{name}.self_attn.o_proj.weight", heads, C, layer=layer)
            take_vector(WeightPart.MLP_NORM, f"{name}.post_attention_layernorm.weight", D, layer=layer)
            moe = config.moe
            if moe is None or not moe.has_layer(layer):
                take_mlp(f"{name}.mlp", columns, layer, 0)
                continue
            E, width = moe.num_experts, whole(moe.intermediate_size)
            held = range(E) if self._held is None else self._held[num_mixtures]
            num_mixtures += 1
            take_vector(
                WeightPart.ROUTER_BIAS, f"{name}.mlp.moe_statics.e_score_correction_bias", 1, E, layer=layer, exact=True
            )
            take(WeightPart.ROUTER, f"{name}.mlp.gate.weight", whole(E), 1, layer=layer, exact=True)
            for slot, expert in enumerate(held):
                take_mlp(f"{name}.mlp.experts.{expert}", width, layer, slot)
            for expert in sorted(set(range(E)) - set(held)):
                skip_mlp(f"{name}.mlp.experts.{expert}", width.total)
            if moe.num_shared_experts:
                shared = whole(width.total * moe.num_shared_experts)
                take_mlp(f"{name}.mlp.shared_experts", shared, layer, len(held))
        take_vector(WeightPart.NORM, "model.norm.weight", D)
        if not config.tie_word_embeddings:
            take(WeightPart.HEAD, "lm_head.weight", tokens, 1)
        run_all(jobs, self._num_threads)
        checkpoint.require_all_taken(unused=("lm_head.weight",) if config.tie_word_embeddings else ())


def _runs(num_rows: int, num_columns: int) -> list[tuple[int, int]]:
    """A matrix as (first row, rows) for one job each."""
    step = max(1, _JOB_VALUES // num_columns)
    return [(start, min(step, num_rows - start)) for start in range(0, num_rows, step)]


def _dimensions(config: ErnieConfig, num_threads: int, layout: Layout, num_slots: int) -> Dimensions:
    moe, tokens = config.moe, layout.share(config.vocab_size)
    is_mixture = np.array([int(moe is not None and moe.has_layer(i)) for i in range(config.num_layers)], dtype=np.int64)
    frequencies_P = frequencies(config.head_dim, config.rope_theta)
    dimensions = Dimensions(
        vocab_size=config.vocab_size,
        first_token=tokens.first,
        num_tokens=tokens.count,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=layout.share(config.num_heads).count,
        num_kv_heads=layout.share(config.num_kv_heads).count,
        head_dim=config.head_dim,
        dense_width=layout.share(config.intermediate_size).count,
        num_experts=moe.num_experts if moe else 0,
        num_choices=moe.num_experts_per_token if moe else 0,
        num_slots=num_slots,
        expert_width=moe.intermediate_size if moe else 0,
        shared_width=moe.intermediate_size * moe.num_shared_experts if moe else 0,
        num_threads=num_threads,
        eps=config.rms_norm_eps,
        norm_min=moe.norm_min if moe else 0.0,
        frequencies=frequencies_P.data_ptr(),
        is_mixture=is_mixture.ctypes.data,
    )
    dimensions.arrays = (frequencies_P, is_mixture)  # kept alive as long as the addresses
    return dimensions


def whole(total: int) -> Share:
    return Share(0, total, total)


def _fresh_block(piece: SequenceSlice) -> int | None:
    """The block that gets its first token from this slice and is not filled by it."""
    end = piece.start + len(piece.token_ids)
    last = end // BLOCK_SIZE
    return int(piece.block_table[last]) if end % BLOCK_SIZE and piece.start <= last * BLOCK_SIZE else None


def _int64(values: object) -> np.typing.NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)  # type: ignore[call-overload]
