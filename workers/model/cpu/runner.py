"""Computes batches with PyTorch: the Runner of a served checkpoint. Knows no scheduler and no network.

Shapes: T rows of a step, D hidden.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch
from torch import Tensor

from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.kv_memory.memory import KvMemory
from workers.machine.limits import available_bytes
from workers.machine.processors import Processors, too_few
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint, checkpoint_folder, fingerprint, with_stored_head
from workers.model.cpu.self_test import require_invariance
from workers.model.decoder.ernie import Ernie
from workers.model.decoder.kv_tensors import KvPool, allocate
from workers.model.decoder.layers import compute_dtype
from workers.model.decoder.model_runner import ModelRunner, describe_model, dtype_name, require_memory, served_len
from workers.model.native.build import BuildFailed, default_cache_folder, source_hash
from workers.model.native.ernie import NativeErnie, require_supported
from workers.model.native.library import Library
from workers.model.native.loading import load
from workers.model.native.packed import PackedFile
from workers.model.parallel.layout import SINGLE, Layout
from workers.runner import Batch, LayerHook
from workers.status import ModelInfo

logger = logging.getLogger(__name__)


class TorchRunner(ModelRunner[Ernie | NativeErnie]):
    """Implements workers.runner.Runner on the CPU."""

    def __init__(self, model: Ernie | NativeErnie, memory: KvMemory, info: ModelInfo, num_threads: int = 1) -> None:
        super().__init__(model, memory, info)
        self._processors = Processors()
        self._pool = KvPool(memory)
        self._num_threads = num_threads
        self._thread = 0
        if isinstance(model, NativeErnie):
            self.row_kernel = model.row_kernel
        self.decode_agrees = isinstance(model, NativeErnie)
        """The KV that decoding writes has the bits that computing the same tokens as a prompt gives."""

    @staticmethod
    def load(config: WorkerConfig) -> TorchRunner:
        """The runner of a "-PT" checkpoint folder. Raises InvalidConfig when it cannot be served as configured."""
        if config.device != "cpu":
            raise InvalidConfig(f"TorchRunner runs on worker.device cpu, not {config.device!r}")
        processors = Processors.of(config.cpus)
        return processors.run(lambda: TorchRunner._load_on(processors, config))

    @staticmethod
    def _load_on(processors: Processors, config: WorkerConfig) -> TorchRunner:
        folder = checkpoint_folder(config.model)
        dimensions, checkpoint = ErnieConfig.load(folder), Checkpoint(folder)
        dimensions = with_stored_head(dimensions, checkpoint)
        max_model_len = served_len(config, dimensions)
        torch.set_num_threads(config.num_threads)
        dtype: torch.dtype = getattr(torch, config.dtype)
        with torch.inference_mode():
            model, kernels, warnings = _load_model(config, dimensions, checkpoint, dtype, max_model_len)
            memory = allocate(config, dimensions, dtype, max_model_len)
        processors.bind(memory.bytes.ctypes.data, memory.bytes.nbytes)
        if crowded := too_few(config.num_threads, processors):
            logger.warning(crowded)
            warnings = (*warnings, crowded)
        info = describe_model(config, checkpoint, memory.layout, dimensions.vocab_size, max_model_len, kernels)
        runner = TorchRunner(model, memory, info, config.num_threads)
        runner.warnings = warnings
        runner._processors = processors
        return runner

    def hidden_states(self, batch: Batch, on_layer: LayerHook | None = None) -> Tensor:
        """Runs the layers, writes KV, returns the last layer's output [T, D] for `model.logits`."""
        self._use_threads()
        with torch.inference_mode():
            return self._model.compute(batch, self._pool, on_layer)

    def _use_threads(self) -> None:
        if self._thread != threading.get_ident():  # torch keeps the number of threads per calling thread
            self._processors.pin()
            torch.set_num_threads(self._num_threads)
            self._thread = threading.get_ident()


def _load_model(
    config: WorkerConfig, dimensions: ErnieConfig, checkpoint: Checkpoint, dtype: torch.dtype, max_model_len: int
) -> tuple[Ernie | NativeErnie, str, tuple[str, ...]]:
    """The model on the best kernels this machine can run, their name for the fingerprint, and warnings."""
    library, warnings = find_library(config, dimensions)
    kernels = kernel_name(library, dtype)
    held_dtype = weights_dtype(library, dtype)
    require_memory(
        checkpoint, dimensions, dtype, available_bytes(), copies_tied_head=library is None, packed_dtype=held_dtype
    )
    if library is not None:
        packed = packed_file(config, checkpoint, library)
        native = NativeErnie(dimensions, checkpoint, dtype, library, config.num_threads, packed=packed)
        return native, kernels, warnings
    model = Ernie(dimensions, checkpoint, held_dtype, max_model_len)
    return model, kernels, (*warnings, *require_invariance(model, dtype))


def find_library(
    config: WorkerConfig, dimensions: ErnieConfig, layout: Layout = SINGLE
) -> tuple[Library | None, tuple[str, ...]]:
    """The C++ kernels, or None where they are not wanted or cannot run this model here; and warnings that say why."""
    if not config.native:
        return None, ()
    try:
        require_supported(dimensions, layout)
        library, warnings = load(Path(config.cache_folder) if config.cache_folder else None, config.instruction_set)
    except BuildFailed as error:
        warning = f"computing with PyTorch's kernels, which is slower: {error}"
        logger.warning(warning)
        return None, (warning,)
    logger.info("computing with the C++ kernels for %s", library.instruction_set)
    return library, warnings


def weights_dtype(library: Library | None, dtype: torch.dtype) -> torch.dtype:
    """What weights of a model that is served in `dtype` are held and computed in."""
    return compute_dtype(dtype) if library is None else dtype


def kernel_name(library: Library | None, dtype: torch.dtype) -> str:
    """Kernels with the same name compute the same bits: a fact of the fingerprint. Says in the log where PyTorch's do not
    compute in `dtype`."""
    if library is None:
        wide = compute_dtype(dtype)
        if wide is dtype:
            return "torch"
        logger.info(
            "computing the %s model in %s, which is faster on this machine and takes twice the memory for weights",
            dtype_name(dtype),
            dtype_name(wide),
        )
        return f"torch in {dtype_name(wide)}"
    return f"native {library.arithmetic(dtype is torch.bfloat16)} {source_hash()}"


def packed_file(config: WorkerConfig, checkpoint: Checkpoint, library: Library) -> PackedFile | None:
    """Where the weights of this checkpoint are kept once they are packed; None: nowhere. Raises InvalidConfig."""
    if not config.packed_weights_bytes:
        return None
    try:
        folder = Path(config.cache_folder) if config.cache_folder else default_cache_folder()
    except BuildFailed as error:
        raise InvalidConfig(f"worker.packed_weights_bytes needs a worker.cache_folder: {error}") from error
    # Samples of the weights may miss a change in the same file, so when it was last written counts too.
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    content = fingerprint(checkpoint.folder, checkpoint.files, config.dtype, states)
    facts = (content, config.dtype, library.instruction_set, source_hash())
    return PackedFile(folder, config.packed_weights_bytes, facts, config.num_threads)
