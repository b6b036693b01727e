"""What every runner of a language model shares: hidden states to results, and what a worker says about its model.

Shapes: T rows of a step, D hidden, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.grammar.language import engine_name
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint, fingerprint
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled, SampleSpec, SequenceSlice
from workers.sampling.arithmetic import DRAW_VERSION, on_device
from workers.sampling.sampler import Drawn, RowKernel, is_plain, sample, scores_of
from workers.status import ModelInfo
from workers.token_logprobs import PromptScores, join

_PROMPT_LOGPROB_ROWS = 64
"""Rows of logits computed at once for prompt logprobs: bounds memory to 64 * V floats."""


class LanguageModel(Protocol):
    config: ErnieConfig

    def logits(self, x_RD: Tensor) -> Tensor: ...

    def greedy(self, x_RD: Tensor) -> list[int]: ...


M = TypeVar("M", bound=LanguageModel)


class ModelRunner(ABC, Generic[M]):
    """Implements workers.runner.Runner but for the layers."""

    def __init__(self, model: M, memory: KvMemory, info: ModelInfo) -> None:
        self._model = model
        self._memory = memory
        self._info = info
        self.warnings: tuple[str, ...] = ()
        """What was found at start-up, one sentence each."""
        self.row_kernel: RowKernel | None = None
        """Faster kernels for drawing, where the logits are on the host."""

    @abstractmethod
    def hidden_states(self, batch: Batch, on_layer: LayerHook | None = None) -> Tensor:
        """Runs the layers, writes KV, returns the last layer's output [T, D] for `model.logits`."""

    @property
    def vocab_size(self) -> int:
        return self._info.vocab_size

    @property
    def num_pools(self) -> int:
        return 1

    @property
    def kv_memory(self) -> KvMemory:
        return self._memory

    @property
    def model(self) -> M:
        return self._model

    @property
    def model_info(self) -> ModelInfo:
        return self._info

    @property
    def max_model_len(self) -> int:
        return self._info.max_model_len

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From generation_config.json, else config.json."""
        return self._model.config.eos_token_ids

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        """Computes as the Runner protocol says; a block table too short for its slice raises IndexError."""
        slices = (*batch.prefill, *batch.decode)
        if not slices:
            return []
        with torch.inference_mode():
            x_TD = self.hidden_states(batch, on_layer)
            rows = [0]
            for piece in slices:
                rows.append(rows[-1] + len(piece.token_ids))
            drawn = self._sample(x_TD, slices, rows)
            return [
                Sampled(
                    piece.sequence_id,
                    drawn[i].token_id if i in drawn else None,
                    drawn[i].logprob if i in drawn else None,
                    self._prompt_logprobs(x_TD[rows[i] : rows[i + 1]], piece),
                )
                for i, piece in enumerate(slices)
            ]

    def _sample(self, x_TD: Tensor, slices: Sequence[SequenceSlice], rows: Sequence[int]) -> dict[int, Drawn]:
        """What each slice that asks for a token gets, by its place; forced tokens need no logits."""
        drawn: dict[int, Drawn] = {}
        wanted: list[tuple[int, SampleSpec]] = []
        for i, piece in enumerate(slices):
            if piece.sample is None:
                continue
            if piece.sample.forced_token_id is not None:
                drawn[i] = Drawn(piece.sample.forced_token_id)
            else:
                wanted.append((i, piece.sample))
        if wanted:
            last_rows = on_device([rows[i + 1] - 1 for i, _ in wanted], x_TD.device)
            x_RD, specs = x_TD.index_select(0, last_rows), [spec for _, spec in wanted]
            if all(is_plain(spec) for spec in specs):
                found = [Drawn(token_id) for token_id in self._model.greedy(x_RD)]
            else:
                found = sample(self._model.logits(x_RD), specs, self.row_kernel)
            drawn.update(zip((i for i, _ in wanted), found, strict=True))
        return drawn

    def _prompt_logprobs(self, x_TD: Tensor, piece: SequenceSlice) -> PromptScores | None:
        """One entry for each row that a prompt token follows; None where there is none, or they are not wanted."""
        if piece.prompt_logprobs is None:
            return None
        following = [*piece.token_ids[1:], *(() if piece.next_token_id is None else (piece.next_token_id,))]
        found: list[PromptScores] = []
        for first in range(0, len(following), _PROMPT_LOGPROB_ROWS):
            tokens = following[first : first + _PROMPT_LOGPROB_ROWS]
            logits_RV = self._model.logits(x_TD[first : first + len(tokens)])
            at = piece.start + 1 + first
            found.append(scores_of(logits_RV, tokens, piece.prompt_logprobs, at, self.row_kernel))
        return join(found) if found else None


def served_len(config: WorkerConfig, dimensions: ErnieConfig) -> int:
    """The longest sequence to serve. Raises InvalidConfig when the model cannot."""
    max_model_len = config.max_model_len or dimensions.max_position_embeddings
    if max_model_len > dimensions.max_position_embeddings:
        raise InvalidConfig(
            f"worker.max_model_len {max_model_len} is above the model's {dimensions.max_position_embeddings} positions"
        )
    return max_model_len


def describe_model(
    config: WorkerConfig, checkpoint: Checkpoint, layout: KvLayout, vocab_size: int, max_model_len: int, *facts: object
) -> ModelInfo:
    """What routers and peers learn; workers exchange KV only when checkpoint, dtype, KV format and `facts` agree."""
    folder = checkpoint.folder
    kv_format = (layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.dtype)
    return ModelInfo(
        name=config.served_model_name or folder.resolve().name,
        fingerprint=fingerprint(folder, checkpoint.files, config.dtype, kv_format, DRAW_VERSION, engine_name(), *facts),
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=BLOCK_SIZE,
        grammars=engine_name(),
        limits=config.limits,
    )


def require_memory(
    checkpoint: Checkpoint,
    dimensions: ErnieConfig,
    dtype: torch.dtype,
    free_bytes: int,
    *,
    copies_tied_head: bool,
    packed_dtype: torch.dtype | None = None,
) -> None:
    """Raises InvalidConfig, before the load, when the packed weights exceed `free_bytes`.

    `copies_tied_head`: embeddings that are also the head are held twice, as a table and packed. `packed_dtype`: what all
    but the table is held in, where that is not `dtype`.
    """
    is_tied = dimensions.tie_word_embeddings
    num_values = checkpoint.num_parameters(unused=("lm_head.weight",) if is_tied else ())
    num_table = dimensions.vocab_size * dimensions.hidden_size
    num_packed = num_values - (0 if is_tied and copies_tied_head else num_table)
    packed_dtype = packed_dtype or dtype
    table_bytes = dtype.itemsize
    if copies_tied_head:  # PyTorch's model keeps the table as narrow as the file has it
        table_bytes = min(checkpoint.stored_dtype("model.embed_tokens.weight").itemsize, packed_dtype.itemsize)
    needed_bytes = num_table * table_bytes + num_packed * packed_dtype.itemsize
    require_bytes(checkpoint.folder, needed_bytes, packed_dtype, free_bytes, served_dtype=dtype)


def require_bytes(
    folder: Path, needed_bytes: int, dtype: torch.dtype, free_bytes: int, served_dtype: torch.dtype | None = None
) -> None:
    """Raises InvalidConfig when weights of `needed_bytes` in `dtype` do not fit; `served_dtype` is what was asked for."""
    if needed_bytes <= free_bytes:
        return
    refusal = (
        f"{folder} needs {needed_bytes / 2**20:.1f} MiB in {dtype_name(dtype)}, "
        f"but {free_bytes / 2**20:.1f} MiB are free"
    )
    if served_dtype is not None and served_dtype is not dtype:
        refusal += (
            f"; PyTorch computes {dtype_name(served_dtype)} models so on this machine; the C++ kernels (worker.native, and a "
            "compiler) take half of it"
        )
    raise InvalidConfig(refusal)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
