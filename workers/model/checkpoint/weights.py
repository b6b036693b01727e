"""Reads tensors from a folder of safetensors files one at a time; knows no layers.

A served model never holds a second full copy in memory: the caller packs each tensor, or piece of one, before it asks
for the next. Files are read rather than mapped, as mapped pages count as memory of the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.progress import ReadProgress, follow
from workers.model.checkpoint.weight_files import open_weights, read_header, weight_files

_log = logging.getLogger(__name__)

_READABLE_DTYPES = ("F32", "F16", "BF16")
_PIECE_BYTES = 8 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_IGNORED = re.compile(r"^model\.mtp_|rotary_emb\.inv_freq$")
"""Multi-token-prediction weights (not used yet) and buffers that old exporters stored."""


class Checkpoint:
    """The tensors of a "-PT" folder: model.safetensors, or shards named by model.safetensors.index.json.

    Raises InvalidConfig that names the file or tensor when something is missing or of another shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of_tensor: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        self._taken: set[str] = set()
        self._local = threading.local()
        self._streams: dict[Path, FileIO] = {}
        self._handles: dict[Path, Any] = {path: open_weights(path, "pt") for path in weight_files(folder)}
        for path, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                self._file_of_tensor[name] = path
            self._offsets |= {name: stored.offset for name, stored in read_header(path).items()}
            self._streams[path] = FileIO(path)
        if any(name.startswith("ernie.") for name in self._file_of_tensor):
            raise InvalidConfig(f'{folder} holds PaddlePaddle tensor names; use the "-PT" checkpoint of this model')
        wanted = [name for name in self._file_of_tensor if not _IGNORED.search(name)]
        self._progress = ReadProgress(wanted, sum(self._num_bytes(name) for name in wanted))
        follow(self._progress)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._handles)

    def num_parameters(self, unused: tuple[str, ...] = ()) -> int:
        """Elements of all tensors that a model can take, but for those it leaves unused."""
        names = (n for n in self._file_of_tensor if n not in unused and not _IGNORED.search(n))
        shapes = (self._slice(n).get_shape() for n in names)
        return sum(int(torch.Size(shape).numel()) for shape in shapes)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor called `name`, cast to `dtype`."""
        stored_dtype = self._check(name, shape)
        tensor = torch.empty(shape, dtype=stored_dtype)
        self._read(name, 0, tensor.view(-1).view(torch.uint8))
        return tensor.to(dtype)

    def take_share(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, dim: int, first: int, count: int
    ) -> Tensor:
        """Elements first .. first+count-1 along `dim` (0 or 1) of the tensor called `name`, cast to `dtype`.

        Reads rows [first, first+count) alone; of columns it reads some rows at a time, so no more than the share and
        one piece are ever in memory.
        """
        if dim == 0:
            stored_dtype = self._check(name, shape)
            share = torch.empty((count, *shape[1:]), dtype=stored_dtype)
            row_bytes = math.prod(shape[1:]) * stored_dtype.itemsize
            self._progress.leave_out((shape[0] - count) * row_bytes)
            self._read(name, first * row_bytes, share.view(-1).view(torch.uint8))
            return share.to(dtype)
        share = torch.empty((shape[0], count), dtype=dtype)
        for row, rows in self.pieces(name, shape, dtype):
            share[row : row + len(rows)] = rows[:, first : first + count]
        return share

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        """Counts a tensor that another rank takes as known. Raises InvalidConfig as `take` does."""
        self._progress.leave_out(self._num_bytes(name) if self._check(name, shape) else 0)

    def skip_rows(self, name: str, shape: tuple[int, ...], num_rows: int) -> None:
        """Counts so many rows of a tensor, which other ranks read, as theirs: `pieces` with a `part` reads the others. Raises InvalidConfig."""
        self._progress.leave_out(num_rows * math.prod(shape[1:]) * self._check(name, shape).itemsize)

    def pieces(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, part: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The same, some rows at a time: (first row, rows), valid until the calling thread asks for the next.

        `part`: of `part[1]` rows from row `part[0]` on alone, which is then row 0.
        """
        stored_dtype = self._check(name, shape)
        start, count = part or (0, shape[0])
        row_bytes = math.prod(shape[1:]) * stored_dtype.itemsize
        step = max(1, _PIECE_BYTES // row_bytes)
        for first in range(0, count, step):
            num_bytes = min(step, count - first) * row_bytes
            staged = self._staging(num_bytes)
            self._read(name, (start + first) * row_bytes, staged)
            yield first, staged.view(stored_dtype).view(-1, *shape[1:]).to(dtype)

    def _staging(self, num_bytes: int) -> Tensor:
        """Memory of the calling thread's own."""
        staging: Tensor | None = getattr(self._local, "staging", None)
        if staging is None or staging.numel() < num_bytes:
            staging = self._local.staging = torch.empty(num_bytes, dtype=torch.uint8)
        return staging[:num_bytes]

    def _check(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """Element type on disk of a tensor that is as it should be, which now counts as taken. Raises InvalidConfig."""
        if name not in self._file_of_tensor:
            raise InvalidConfig(f"{self.folder} has no tensor {name}, which its config.json calls for")
        stored = self._slice(name)
        where = f"tensor {name} in {self._file_of_tensor[name]}"
        if stored.get_dtype() not in _READABLE_DTYPES:
            raise InvalidConfig(f"{where} is {stored.get_dtype()}; quantized checkpoints are not supported")
        if tuple(stored.get_shape()) != shape:
            raise InvalidConfig(f"{where} has shape {stored.get_shape()}; config.json calls for {list(shape)}")
        self._taken.add(name)
        self._progress.begin(name)
        return self.stored_dtype(name)

    def _read(self, name: str, start: int, into: Tensor) -> None:
        """Fills a flat uint8 tensor with the bytes of a tensor from `start` on. Several threads may."""
        path = self._file_of_tensor[name]
        file, at = self._streams[path].fileno(), self._offsets[name] + start
        view = into.numpy().data
        while len(view):
            num_read = os.preadv(file, [view], at)
            if not num_read:
                raise InvalidConfig(f"{path} ends within tensor {name}")
            view, at = view[num_read:], at + num_read
            self._progress.read(num_read)
        os.posix_fadvise(file, at, into.numel(), os.POSIX_FADV_WILLNEED)  # the disk reads on while this piece is packed

    def _num_bytes(self, name: str) -> int:
        """On disk."""
        return math.prod(map(int, self._slice(name).get_shape())) * self.stored_dtype(name).itemsize

    def stored_dtype(self, name: str) -> torch.dtype:
        """Element type on disk; fp32 where there is none to read, which `take` then explains."""
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return kinds.get(self._slice(name).get_dtype() if name in self._file_of_tensor else "F32", torch.float32)

    def require_all_taken(self, unused: tuple[str, ...] = ()) -> None:
        """Raises InvalidConfig when a tensor is left that the model does not know, such as a bias or a scale."""
        for name in sorted(self._file_of_tensor.keys() - self._taken - set(unused)):
            if not _IGNORED.search(name):
                raise InvalidConfig(
                    f"tensor {name} in {self._file_of_tensor[name]} is not part of the model in config.json"
                )

    def differ(self, first: str, second: str) -> bool:
        """Whether two tensors that are both here hold other values; as two of other types do. Reads them up to the first difference."""
        shapes = [tuple(self._slice(name).get_shape()) for name in (first, second)]
        if shapes[0] != shapes[1] or self.stored_dtype(first) is not self.stored_dtype(second):
            return True
        num_bytes = math.prod(shapes[0]) * self.stored_dtype(first).itemsize
        pieces = [torch.empty(min(num_bytes, _PIECE_BYTES), dtype=torch.uint8) for _ in range(2)]
        for start in range(0, num_bytes, _PIECE_BYTES):
            mine, its = (piece[: min(_PIECE_BYTES, num_bytes - start)] for piece in pieces)
            self._read(first, start, mine)
            self._read(second, start, its)
            if not torch.equal(mine, its):
                return True
        return False

    def has(self, name: str) -> bool:
        return name in self._file_of_tensor

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of_tensor[name]].get_slice(name)


_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_stored_head(config: ErnieConfig, checkpoint: Checkpoint) -> ErnieConfig:
    """What config.json calls for; but a head that is stored and is not the embeddings is the head, though config.json says that
    they are one, as a merged adapter leaves it. transformers reads it so too."""
    both = checkpoint.has(_HEAD) and checkpoint.has(_EMBEDDINGS)
    if not config.tie_word_embeddings or not both or not checkpoint.differ(_EMBEDDINGS, _HEAD):
        return config
    _log.warning(
        "%s has a head of its own, which is used, though its config.json says that it has not", checkpoint.folder
    )
    return replace(config, tie_word_embeddings=False)


def give_back_free_memory() -> None:
    """Returns freed memory to the system where the C library can: packing leaves holes as large as what it packed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def fingerprint(folder: Path, files: tuple[Path, ...], *facts: object) -> str:
    """Names the content of a checkpoint without reading all of it; equal on every host that holds the same files.

    Covers config.json, each weight file's size, its safetensors header (names, types, shapes, offsets) and 16 samples
    of 4 KiB, and `facts` such as the dtype served.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(f"{path.name}/{size}/{header_bytes}".encode())
            digest.update(stream.read(header_bytes))
            for sample in range(_SAMPLES):
                stream.seek(8 + header_bytes + (size - 8 - header_bytes) * sample // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    digest.update(repr(facts).encode())
    return digest.hexdigest()


def checkpoint_folder(model: str) -> Path:
    """The folder that `model` names. Raises InvalidConfig when it cannot be one."""
    folder = Path(model)
    if folder.name.lower().endswith("-paddle"):
        raise InvalidConfig(f'{model} names PaddlePaddle weights; use the "-PT" checkpoint of the same model instead')
    if not folder.is_dir():
        raise InvalidConfig(f'worker.model {model} is not a folder; download the "-PT" checkpoint and give its path')
    return folder
