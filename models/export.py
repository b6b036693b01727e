"""Writes a trained network as a checkpoint folder in the published "-PT" format, and reads such a folder back."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from chat import BEGIN_ID, BOS_ID, CHAT_TEMPLATE, END_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS
from network import MixtureOfExperts, Network, NetworkConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

EXACT = (".mlp.gate.weight", ".e_score_correction_bias")


def disk_views(network: Network) -> dict[str, Tensor]:
    """Views of the network's own memory under the published names."""
    views: dict[str, Tensor] = {
        "model.embed_tokens.weight": network.embed_tokens,
        "model.norm.weight": network.norm.weight,
    }
    for index, layer in enumerate(network.layers):
        prefix = f"model.layers.{index}."
        mlp = layer.mlp
        for name, weight in layer.named_parameters():
            if isinstance(mlp, MixtureOfExperts) and name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                for expert, view in enumerate(weight.unbind()):
                    views[f"{prefix}mlp.experts.{expert}.{name.removeprefix('mlp.')}.weight"] = view
            elif name == "mlp.router":
                views[f"{prefix}mlp.gate.weight"] = weight
            else:
                views[f"{prefix}{name.removesuffix('.weight')}.weight"] = weight
        if isinstance(mlp, MixtureOfExperts):
            views[f"{prefix}mlp.moe_statics.e_score_correction_bias"] = mlp.bias_E[None]
    return views


def disk_weights(network: Network) -> dict[str, Tensor]:
    """The weights as they are stored: bf16, but fp32 for routers and their correction biases."""
    return {
        name: view.detach().to(torch.float32 if name.endswith(EXACT) else torch.bfloat16).clone().contiguous()
        for name, view in sorted(disk_views(network).items())
    }


def count_parameters(network: Network) -> int:
    """Parameters as stored, the correction biases included."""
    return sum(view.numel() for view in disk_views(network).values())


def config_json(config: NetworkConfig) -> dict[str, object]:
    fields = dataclasses.asdict(config)
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        **fields,
        "moe_layer_end_index": config.num_hidden_layers - 1,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_bias": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }


def tokenizer_config_json(config: NetworkConfig) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **special_tokens_map_json(),
    }


def special_tokens_map_json() -> dict[str, str]:
    return {
        "unk_token": SPECIAL_TOKENS[PAD_ID],
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "cls_token": SPECIAL_TOKENS[BEGIN_ID],
        "sep_token": SPECIAL_TOKENS[END_ID],
    }


def export(network: Network, tokenizer: Tokenizer, folder: Path, extra: dict[str, str]) -> None:
    """Writes the checkpoint beside `folder` and renames it into place, so that readers never see half of one.

    `extra` maps further file names (model card, examples) to their text.
    """
    staging = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    config = network.config
    save_file(disk_weights(network), staging / "model.safetensors", metadata={"format": "pt"})
    (staging / "model.safetensors").chmod(0o644)
    tokenizer.save(str(staging / "tokenizer.json"))
    documents: dict[str, dict[str, object] | dict[str, str]] = {
        "config.json": config_json(config),
        "tokenizer_config.json": tokenizer_config_json(config),
        "special_tokens_map.json": special_tokens_map_json(),
        "generation_config.json": {
            "bos_token_id": BOS_ID,
            "pad_token_id": PAD_ID,
            "eos_token_id": [EOS_ID, END_ID],
            "do_sample": False,
        },
    }
    for name, document in documents.items():
        (staging / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (staging / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, text in extra.items():
        (staging / name).write_text(text, encoding="utf-8")
    retired = folder.with_name(f".{folder.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        os.rename(folder, retired)
    os.rename(staging, folder)
    shutil.rmtree(retired, ignore_errors=True)


def load(folder: Path) -> Network:
    """The network of an exported checkpoint, its weights in fp32."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(NetworkConfig)}
    network = Network(NetworkConfig(**{name: value for name, value in document.items() if name in names}))
    stored = load_file(folder / "model.safetensors")
    for name, view in disk_views(network).items():
        view.data.copy_(stored[name])
    return network
