"""The ERNIE 4.5 decoder on the C++ kernels; has the face of workers.model.ernie.Ernie.

Shapes: T rows of a step, D hidden, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

import weakref
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from workers.model.ernie_config import ErnieConfig
from workers.model.kv_memory import KvPool
from workers.model.native.build import BuildFailed
from workers.model.native.draw import NativeRowKernel
from workers.model.native.library import Dimensions, Library, Part, Step
from workers.model.rope import frequencies
from workers.model.weights import Checkpoint
from workers.runner import BLOCK_SIZE, Batch, LayerHook, SequenceSlice


def require_supported(config: ErnieConfig) -> None:
    """Raises BuildFailed when the kernels' vector width does not divide the model's dimensions."""
    rules = [
        ("head_dim", config.head_dim, 32),
        ("hidden_size", config.hidden_size, 32),
        ("intermediate_size", config.intermediate_size, 2),
    ]
    if config.moe is not None:
        rules.append(("moe_intermediate_size", config.moe.intermediate_size, 2))
    for name, value, divisor in rules:
        if value % divisor:
            raise BuildFailed(f"the C++ kernels need a {name} that is a multiple of {divisor}; it is {value}")


class NativeErnie:
    """A text model with its weights packed in `dtype` in the kernels' memory."""

    def __init__(
        self, config: ErnieConfig, checkpoint: Checkpoint, dtype: torch.dtype, library: Library, num_threads: int
    ) -> None:
        """Takes every weight of the checkpoint in turn. Raises InvalidConfig when one is missing, misshapen or unknown."""
        self.config = config
        self._dtype = dtype
        self._library = library
        self._model = library.create(_dimensions(config, num_threads), dtype is torch.bfloat16)
        weakref.finalize(self, library.destroy, self._model)
        self.row_kernel = NativeRowKernel(library, self._model)
        self._load(checkpoint)

    def compute(self, batch: Batch, pool: KvPool, on_layer: LayerHook | None = None) -> Tensor:
        """Hidden states [T, D] after the last layer; keys and values of all rows are in the pool afterwards.

        Raises IndexError where a block table is too short.
        """
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
        x_TD = torch.empty(rows[-1], self.config.hidden_size, dtype=self._dtype)
        arrays = [
            _int64(chain.from_iterable(piece.token_ids for piece in slices)),
            _int64(chain.from_iterable(range(s.start, s.start + n) for s, n in zip(slices, counts, strict=True))),
            _int64(rows),
            _int64(chain.from_iterable(tables)),
            _int64(accumulate(num_blocks[:-1], initial=0)),
        ]
        sizes = (rows[-1], len(slices), len(arrays[3]), pool.layout.num_blocks)
        step = Step(*sizes, *(array.ctypes.data for array in arrays))
        self._library.forward(self._model, step, pool.address, x_TD.data_ptr(), on_layer)
        return x_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of hidden states."""
        logits_RV = torch.empty(x_RD.shape[0], self.config.vocab_size)
        self._head(x_RD, logits_RV)
        return logits_RV

    def greedy(self, x_RD: Tensor) -> list[int]:
        """The most likely token of each row, of equals the lowest; writes no logits."""
        return self._head(x_RD, None)

    def _head(self, x_RD: Tensor, logits_RV: Tensor | None) -> list[int]:
        x_RD = x_RD.contiguous()
        best_R = np.empty(x_RD.shape[0], dtype=np.int64)
        address = None if logits_RV is None else logits_RV.data_ptr()
        self._library.head(self._model, x_RD.data_ptr(), x_RD.shape[0], address, best_R.ctypes.data)
        found: list[int] = best_R.tolist()
        return found

    def _load(self, checkpoint: Checkpoint) -> None:
        config, D, C = self.config, self.config.hidden_size, self.config.head_dim
        H, K = config.num_heads * C, config.num_kv_heads * C

        def take_vector(part: Part, name: str, *shape: int, layer: int = 0, exact: bool = False) -> None:
            values = checkpoint.take(name, shape, torch.float32 if exact else self._dtype)
            self._library.take(self._model, part, layer, 0, 0, values.numel(), values.data_ptr())

        def take(part: Part, name: str, *shape: int, layer: int = 0, expert: int = 0, exact: bool = False) -> None:
            for first, rows in checkpoint.pieces(name, shape, torch.float32 if exact else self._dtype):
                self._library.take(self._model, part, layer, expert, first, len(rows), rows.data_ptr())

        def take_mlp(prefix: str, width: int, layer: int, expert: int) -> None:
            take(Part.GATE, f"{prefix}.gate_proj.weight", width, D, layer=layer, expert=expert)
            take(Part.UP, f"{prefix}.up_proj.weight", width, D, layer=layer, expert=expert)
            take(Part.DOWN, f"{prefix}.down_proj.weight", D, width, layer=layer, expert=expert)

        take(Part.EMBEDDING, "model.embed_tokens.weight", config.vocab_size, D)
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}"
            take_vector(Part.INPUT_NORM, f"{name}.input_layernorm.weight", D, layer=layer)
            for part, key, rows in ((Part.QUERY, "q", H), (Part.KEY, "k", K), (Part.VALUE, "v", K)):
                take(part, f"{name}.self_attn.{key}_proj.weight", rows, D, layer=layer)
            take(Part.OUTPUT, f"{name}.self_attn.o_proj.weight", D, H, layer=layer)
            take_vector(Part.MLP_NORM, f"{name}.post_attention_layernorm.weight", D, layer=layer)
            moe = config.moe
            if moe is None or not moe.has_layer(layer):
                take_mlp(f"{name}.mlp", config.intermediate_size, layer, 0)
                continue
            E, width = moe.num_experts, moe.intermediate_size
            take_vector(
                Part.ROUTER_BIAS, f"{name}.mlp.moe_statics.e_score_correction_bias", 1, E, layer=layer, exact=True
            )
            take(Part.ROUTER, f"{name}.mlp.gate.weight", E, D, layer=layer, exact=True)
            for expert in range(E):
                take_mlp(f"{name}.mlp.experts.{expert}", width, layer, expert)
            if moe.num_shared_experts:
                take_mlp(f"{name}.mlp.shared_experts", width * moe.num_shared_experts, layer, E)
        take_vector(Part.NORM, "model.norm.weight", D)
        if not config.tie_word_embeddings:
            take(Part.HEAD, "lm_head.weight", config.vocab_size, D)
        checkpoint.require_all_taken(unused=("lm_head.weight",) if config.tie_word_embeddings else ())


def _dimensions(config: ErnieConfig, num_threads: int) -> Dimensions:
    moe = config.moe
    is_mixture = np.array([int(moe is not None and moe.has_layer(i)) for i in range(config.num_layers)], dtype=np.int64)
    frequencies_P = frequencies(config.head_dim, config.rope_theta)
    dimensions = Dimensions(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dense_width=config.intermediate_size,
        num_experts=moe.num_experts if moe else 0,
        num_choices=moe.num_experts_per_token if moe else 0,
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


def _fresh_block(piece: SequenceSlice) -> int | None:
    """The block that gets its first token from this slice and is not filled by it."""
    end = piece.start + len(piece.token_ids)
    last = end // BLOCK_SIZE
    return piece.block_table[last] if end % BLOCK_SIZE and piece.start <= last * BLOCK_SIZE else None


def _int64(values: object) -> np.typing.NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)  # type: ignore[call-overload]
