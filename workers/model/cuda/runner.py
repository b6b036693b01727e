"""Computes batches on a CUDA device: the Runner of a served checkpoint there. Knows no scheduler and no network.

A step with prompts and decode tokens makes two passes over the weights, so that decode always has its graphs and its
tiles. Shapes: T rows of a step, D hidden.

Shapes: T rows of a step, D hidden, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.errors import DeviceStuck, InvalidConfig
from workers.machine.limits import available_bytes
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint, checkpoint_folder, with_stored_head
from workers.model.cuda.decode_graphs import DecodeGraphs
from workers.model.cuda.device_pool import DevicePool, OnFilled, StagedKvMemory
from workers.model.cuda.ernie import CudaErnie
from workers.model.cuda.layer_copies import StepCopies
from workers.model.cuda.step_inputs import LateTokens, StepInputs, Upload
from workers.model.decoder.kv_tensors import choose_layout
from workers.model.decoder.model_runner import ModelRunner, describe_model, require_memory, served_len
from workers.runner import BLOCK_SIZE, Batch, LayerHook, Sampled, SampleSpec, SequenceSlice
from workers.sampling.arithmetic import on_device
from workers.sampling.sampler import Drawn, draw, with_logprobs
from workers.status import ModelInfo


class LaunchedStep:
    """The handle of CudaRunner.launch. Only `wait` waits for the device.

    The tokens' copy to the host stands directly behind their draw: one that is asked for later would run behind the next
    step. Logprobs are computed when they are waited for; the logits are kept for them.
    """

    def __init__(
        self, batch: Batch, x_TD: Tensor, logits: Callable[[Tensor], Tensor], copies: StepCopies | None = None
    ) -> None:
        self.copies = copies
        """Of blocks that another worker waits for."""
        self.slices = (*batch.prefill, *batch.decode)
        self.rows = list(accumulate((len(piece.token_ids) for piece in self.slices), initial=0))
        self.x_TD = x_TD
        """Prompt logprobs are made of it; a batch with prompts has it in memory of its own."""
        self._forced: dict[int, Drawn] = {}
        self._wanted: list[tuple[int, SampleSpec]] = []
        for i, piece in enumerate(self.slices):
            if piece.sample is not None and piece.sample.forced_token_id is not None:
                self._forced[i] = Drawn(piece.sample.forced_token_id)
            elif piece.sample is not None:
                self._wanted.append((i, piece.sample))
        self._tokens_R, self._logits_RV = torch.zeros(0, dtype=torch.int64, device=x_TD.device), x_TD[:0]
        if self._wanted:
            last_rows = on_device([self.rows[i + 1] - 1 for i, _ in self._wanted], x_TD.device)
            specs = [spec for _, spec in self._wanted]
            logits_RV = logits(x_TD.index_select(0, last_rows))
            self._tokens_R = draw(logits_RV, specs)
            if any(spec.params.logprobs is not None for spec in specs):
                self._logits_RV = logits_RV
        is_cuda = x_TD.is_cuda
        self._host_R = torch.empty(len(self._tokens_R), dtype=torch.int64, pin_memory=is_cuda)
        self._host_R.copy_(self._tokens_R, non_blocking=True)
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(x_TD.device))

    @property
    def late_tokens(self) -> LateTokens:
        """For the step behind this one."""
        row_of = {self.slices[i].sequence_id: row for row, (i, _) in enumerate(self._wanted)}
        return LateTokens(self._tokens_R, row_of)

    def wait(self) -> dict[int, Drawn]:
        """What each slice that asks for a token gets, by its place."""
        if self._copied is not None:
            self._copied.synchronize()
        found = with_logprobs(self._logits_RV, self._host_R.tolist(), [spec for _, spec in self._wanted])
        return self._forced | dict(zip((i for i, _ in self._wanted), found, strict=True))


_MAX_GRAPH_BYTES = 1 << 30
_GRAPH_SHARE = 4
"""Graphs may hold 1 GiB, but no more than this part of what the KV pool leaves free; activations need the rest."""


class CudaRunner(ModelRunner[CudaErnie]):
    """Implements workers.runner.Runner on one CUDA device."""

    def __init__(
        self,
        model: CudaErnie,
        pool: DevicePool,
        info: ModelInfo,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_num_seqs: int,
    ) -> None:
        self._mirrored = StagedKvMemory(pool)
        super().__init__(model, self._mirrored, info)
        self._pool = pool
        self._device = device
        self._upload = Upload(device)
        self._decode = DecodeGraphs(
            self._forward,
            hidden_size=model.config.hidden_size,
            dtype=dtype,
            max_rows=max_num_seqs,
            max_blocks=-(-info.max_model_len // BLOCK_SIZE),
            scratch_block=pool.scratch_block,
            device=device,
        )

    @staticmethod
    def load(config: WorkerConfig) -> CudaRunner:
        """The runner of a "-PT" checkpoint folder. Raises InvalidConfig when it cannot be served as configured."""
        return CudaRunner.load_on(config, find_device(config))

    @staticmethod
    def load_on(config: WorkerConfig, device: torch.device) -> CudaRunner:
        """As `load`, on a given device; with Triton's interpreter that may be the CPU."""
        folder = checkpoint_folder(config.model)
        dimensions, checkpoint = ErnieConfig.load(folder), Checkpoint(folder)
        dimensions = with_stored_head(dimensions, checkpoint)
        max_model_len = served_len(config, dimensions)
        dtype: torch.dtype = getattr(torch, config.dtype)
        require_memory(checkpoint, dimensions, dtype, free_bytes(device), copies_tied_head=False)
        with torch.inference_mode(), as_current(device):
            model = CudaErnie(dimensions, checkpoint, dtype, max_model_len, device, config.deterministic)
            layout = choose_layout(config, dimensions, dtype, max_model_len, free_bytes(device))
            pool = DevicePool(layout, device)
            info = describe_model(config, checkpoint, layout, dimensions.vocab_size, max_model_len, device.type)
            runner = CudaRunner(model, pool, info, device=device, dtype=dtype, max_num_seqs=config.max_num_seqs)
            if device.type == "cuda":
                runner.warnings = runner.warm_up()
        return runner

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        return self.finish(self.launch(batch, None, on_layer)) if batch.num_tokens else []

    def launch(
        self, batch: Batch, after: LaunchedStep | None = None, on_layer: LayerHook | None = None
    ) -> LaunchedStep:
        """Gives the device a step to run behind the one before it; nothing here waits for results."""
        with torch.inference_mode(), as_current(self._device), last_words():
            late = None if after is None else after.late_tokens
            copies = self._mirrored.follow(on_layer)
            try:
                x_TD = self.hidden_states(batch, late=late, on_filled=None if copies is None else copies.filled)
                return LaunchedStep(batch, x_TD, self._model.logits, copies)
            except BaseException:
                if copies is not None:
                    copies.abandon()
                raise

    def finish(self, launched: LaunchedStep) -> list[Sampled]:
        """Waits for the step's tokens, not for a step behind it, and reads the logprobs asked for."""
        with torch.inference_mode(), as_current(self._device), last_words():
            drawn = self._wait(launched)
            return [
                Sampled(
                    piece.sequence_id,
                    drawn[i].token_id if i in drawn else None,
                    drawn[i].logprob if i in drawn else None,
                    self._prompt_logprobs(launched.x_TD[launched.rows[i] : launched.rows[i + 1]], piece),
                )
                for i, piece in enumerate(launched.slices)
            ]

    def _wait(self, launched: LaunchedStep) -> dict[int, Drawn]:
        """Its tokens, once all layers have been told of and the mirror has the blocks of its hook."""
        try:
            drawn = launched.wait()
        except BaseException:
            if launched.copies is not None:
                launched.copies.abandon()
            raise
        if launched.copies is not None:
            self._mirrored.followed(launched.copies)
        return drawn

    def hidden_states(
        self,
        batch: Batch,
        on_layer: LayerHook | None = None,
        late: LateTokens | None = None,
        on_filled: OnFilled | None = None,
    ) -> Tensor:
        """Runs the layers, writes KV, returns the last layer's output [T, D].

        A batch that only decodes has it in memory that the next step writes to. `on_filled(n)` is called as the kernels that
        write the prompts' keys and values of the first n layers have been launched; `on_layer` is not (see `launch`).
        """
        with torch.inference_mode(), as_current(self._device):
            parts = []
            for piece in batch.prefill:
                if piece.start + len(piece.token_ids) > self.max_model_len:
                    raise IndexError(f"{self.max_model_len} positions are the longest sequence of this runner")
            if batch.prefill:
                parts.append(self._forward(self._upload.prefill(batch.prefill), on_filled))
            if batch.decode:
                parts.append(self._decode.run(batch.decode, late))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def warm_up(self) -> tuple[str, ...]:
        """Compiles the kernels of prompts and records the decode graphs; warnings about graphs that found no memory."""
        with torch.inference_mode(), as_current(self._device):
            scratch = SequenceSlice(0, (0,), 0, (self._pool.scratch_block,))
            self._model.logits(self.hidden_states(Batch(prefill=(scratch,))))
            return self._decode.record(min(_MAX_GRAPH_BYTES, free_bytes(self._device) // _GRAPH_SHARE))

    def _forward(self, inputs: StepInputs, on_filled: OnFilled | None = None) -> Tensor:
        return self._model.forward(inputs, self._pool, on_filled)


def find_device(config: WorkerConfig) -> torch.device:
    """The GPU that config.device names. Raises InvalidConfig when there is none."""
    if not torch.cuda.is_available():
        raise InvalidConfig(f"worker.device {config.device!r} needs a GPU; torch {torch.__version__} finds none")
    device = torch.device(config.device)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise InvalidConfig(f"worker.device {config.device!r} does not exist; there are {torch.cuda.device_count()}")
    return device


def free_bytes(device: torch.device) -> int:
    """Memory of the device that can still be allocated, what torch keeps in reserve returned first."""
    if device.type != "cuda":
        return available_bytes()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """Raises DeviceStuck for an error of the device itself, after which it computes nothing for this process any more."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceStuck(
            f"an operation on the GPU failed, and it computes nothing more for this process: {error}"
        ) from error


def as_current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` current for kernels that are launched on the current one, as Triton's are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
