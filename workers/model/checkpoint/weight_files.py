"""Finds and opens the safetensors files of a checkpoint folder; needs no torch, so that whoever checks a folder reads it as the loader does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from workers.checkpoint_files import MAX_INDEX_BYTES, check_file
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig, read_json

MAX_HEADER_BYTES = 64 << 20
MAX_FILES = 4096


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
    shards = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InvalidConfig(f"{index} needs a weight_map from tensor names to file names")
    for name in shards.values():
        if Path(name).name != name:
            raise InvalidConfig(f"{index} names {name!r}, which is outside the checkpoint folder")
    names = sorted(set(shards.values()))
    if len(names) > MAX_FILES:
        raise InvalidConfig(f"{index} names {len(names)} files; at most {MAX_FILES} are read")
    return [folder / name for name in names]


def open_weights(path: Path, framework: str) -> Any:
    """A safetensors handle, whose header agrees with the file's size. Raises InvalidConfig naming the file."""
    try:
        size = check_file(path)
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if MAX_HEADER_BYTES < header_bytes <= size - 8:
            raise InvalidConfig(f"{path} has a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
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


def check_dimensions(config: ErnieConfig, stored: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises InvalidConfig where config.json promises dimensions that the stored shapes do not have, before memory is taken
    for them. It looks at a tensor for each dimension, in the first and the last layer; the loader looks at all.
    """
    if any(name.startswith("ernie.") for name in stored):
        raise InvalidConfig(f'{folder} holds PaddlePaddle tensor names; use the "-PT" checkpoint of this model')
    width = config.hidden_size
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
    }
    for layer in {0, config.num_layers - 1}:
        prefix = f"model.layers.{layer}"
        expected[f"{prefix}.self_attn.q_proj.weight"] = (config.num_heads * config.head_dim, width)
        expected[f"{prefix}.self_attn.k_proj.weight"] = (config.num_kv_heads * config.head_dim, width)
        if config.moe is not None and config.moe.has_layer(layer):
            last = config.moe.num_experts - 1
            expected[f"{prefix}.mlp.experts.{last}.gate_proj.weight"] = (config.moe.intermediate_size, width)
        else:
            expected[f"{prefix}.mlp.gate_proj.weight"] = (config.intermediate_size, width)
    for name, shape in expected.items():
        found = stored.get(name)
        if found != shape:
            has = f"has {name} of shape {list(found)}" if found else f"lacks {name}"
            raise InvalidConfig(f"{folder} {has}, and its config.json asks for {list(shape)}")


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(23) == b"version https://git-lfs"
    except OSError:
        return False
