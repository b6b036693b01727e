"""Finds and opens the safetensors files of a checkpoint folder; needs no torch, so that whoever checks a folder reads it as the loader does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import read_json


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's entry in a file's header. `offset` is where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def weight_files(folder: Path) -> list[Path]:
    """The files to read, in order of name. Raises InvalidConfig."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise InvalidConfig(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InvalidConfig(f"{index} needs a weight_map from tensor names to file names")
    for name in shards.values():
        if Path(name).name != name:
            raise InvalidConfig(f"{index} names {name!r}, which is outside the checkpoint folder")
    return [folder / name for name in sorted(set(shards.values()))]


def open_weights(path: Path, framework: str) -> Any:
    """A safetensors handle, whose header agrees with the file's size. Raises InvalidConfig naming the file."""
    try:
        return safe_open(str(path), framework=framework)
    except FileNotFoundError:
        raise InvalidConfig(f"{path} is missing, though the index names it") from None
    except (OSError, SafetensorError) as error:
        hint = (
            "it is a git-lfs pointer: fetch it with `git lfs pull`"
            if _is_pointer(path)
            else "is its download complete?"
        )
        raise InvalidConfig(f"{path} cannot be read as safetensors ({error}); {hint}") from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises InvalidConfig as `open_weights` does."""
    open_weights(path, "np")
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(23) == b"version https://git-lfs"
    except OSError:
        return False
