"""Writes seeded random checkpoints that every engine can load: safetensors, config.json, a tokenizer without meaning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from model_shapes import Shape
from safetensors.torch import save_file
from torch import Tensor

MAX_LEN = 4096
"""Positions of a checkpoint, unless more are asked for."""
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

Draw = Callable[..., Tensor]
"""draw(std, *shape) gives bf16 noise; fp32 with exact=True."""


def random_checkpoint(shape: Shape, cache: Path, seed: int = 0, max_len: int = MAX_LEN) -> Path:
    """The folder of a checkpoint of this shape, seed and number of positions; written only when the cache does not hold it."""
    folder = cache / f"{shape.name}-{shape.total_params}-len{max_len}-seed{seed}"
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(shape, partial, seed)
    (partial / "config.json").write_text(json.dumps(shape.config_json(max_len), indent=1))
    (partial / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )
    _write_tokenizer(shape.vocab_size, partial)
    partial.rename(folder)
    return folder


def _write_weights(shape: Shape, folder: Path, seed: int) -> None:
    """One shard a layer, so that memory holds one layer at a time."""
    generator = torch.Generator().manual_seed(seed)

    def draw(std: float, *sizes: int, mean: float = 0.0, exact: bool = False) -> Tensor:
        noise = torch.randn(sizes, generator=generator).mul_(std).add_(mean)
        return noise if exact else noise.to(torch.bfloat16)

    num_shards = shape.num_layers + 1
    weight_map: dict[str, str] = {}
    for place in range(num_shards):
        tensors = dict(_layer(shape, draw, place - 1) if place else _ends(shape, draw))
        name = f"model-{place + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": shape.weight_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _ends(shape: Shape, draw: Draw) -> Iterator[tuple[str, Tensor]]:
    """The embedding is small beside what layers add: a tied model with a large one only repeats its last token."""
    yield "model.embed_tokens.weight", draw(0.05, shape.vocab_size, shape.hidden_size)
    yield "model.norm.weight", draw(0.1, shape.hidden_size, mean=1.0)


def _layer(shape: Shape, draw: Draw, index: int) -> Iterator[tuple[str, Tensor]]:
    prefix, D = f"model.layers.{index}.", shape.hidden_size
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def linear(name: str, rows: int, columns: int) -> tuple[str, Tensor]:
        return f"{prefix}{name}.weight", draw(columns**-0.5, rows, columns)

    def feed_forward(name: str, width: int) -> Iterator[tuple[str, Tensor]]:
        yield linear(f"{name}.gate_proj", width, D)
        yield linear(f"{name}.up_proj", width, D)
        yield linear(f"{name}.down_proj", D, width)

    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{norm}.weight", draw(0.1, D, mean=1.0)
    yield linear("self_attn.q_proj", heads, D)
    yield linear("self_attn.k_proj", kv_heads, D)
    yield linear("self_attn.v_proj", kv_heads, D)
    yield linear("self_attn.o_proj", D, heads)
    if not shape.num_experts or index == 0:
        yield from feed_forward("mlp", shape.intermediate_size)
        return
    # a bias far below a mean probability of 1/E leaves the choice of experts about even
    yield f"{prefix}mlp.gate.weight", draw(D**-0.5, shape.num_experts, D, exact=True)
    bias = draw(0.1 / shape.num_experts, 1, shape.num_experts, exact=True)
    yield f"{prefix}mlp.moe_statics.e_score_correction_bias", bias
    for expert in range(shape.num_experts):
        yield from feed_forward(f"mlp.experts.{expert}", shape.expert_size)
    yield from feed_forward("mlp.shared_experts", shape.num_shared_experts * shape.expert_size)


def token_pieces(vocab_size: int) -> list[str]:
    """Special tokens, the 256 bytes, then words that only have to differ."""
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    return pieces + [f"\u2581w{number}" for number in range(vocab_size - len(pieces))]


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    """tokenizer.json of a SentencePiece-like vocabulary. No prompt is text here; outputs are turned into text."""
    pieces = token_pieces(vocab_size)
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: token_id for token_id, piece in enumerate(pieces)},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_prefix_space": False}
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | named))
