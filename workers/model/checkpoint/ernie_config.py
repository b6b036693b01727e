"""Reads a checkpoint's config.json into the dimensions of an ERNIE 4.5 text model, and refuses what the model cannot compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.checkpoint_files import MAX_CONFIG_BYTES, read_object
from workers.errors import InvalidConfig

MAX_VOCABULARY = 1 << 22
MAX_EOS_IDS = 1024
_MODEL_TYPES = ("ernie4_5", "ernie4_5_moe")
_REFUSED = {
    "vision_config": "a vision-language checkpoint; only text models are served",
    "quantization_config": "a quantized checkpoint; only bf16, fp16 and fp32 weights are read",
}


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Dimensions of the mixture-of-experts layers (ERNIE 4.5 technical report, section 2.2)."""

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    intermediate_size: int
    first_layer: int
    last_layer: int
    interval: int
    norm_min: float

    def has_layer(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, is a mixture; the others are dense."""
        return (layer + 1) % self.interval == 0 and self.first_layer <= layer <= self.last_layer


@dataclass(frozen=True, slots=True)
class ErnieConfig:
    """The dimensions of an ERNIE 4.5 text model; `moe` is None for a dense one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    moe: MoeConfig | None
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def load(folder: Path) -> ErnieConfig:
        """From config.json and generation_config.json of a checkpoint folder. Raises InvalidConfig."""
        path = folder / "config.json"
        fields = _Fields(path, read_json(path))
        model_type = fields.document.get("model_type")
        for key, what in _REFUSED.items():
            if fields.document.get(key):
                raise InvalidConfig(f"{path} has {key}: it is {what}")
        if model_type not in _MODEL_TYPES:
            raise InvalidConfig(
                f"{path} has model_type {_shown(model_type)}; supported are {' and '.join(_MODEL_TYPES)}"
            )
        fields.require_default("use_bias", False)
        fields.require_default("hidden_act", "silu")
        fields.require_default("compression_ratio", 1)

        num_heads = fields.count("num_attention_heads", maximum=4096)
        hidden_size = fields.count("hidden_size")
        config = ErnieConfig(
            vocab_size=fields.count("vocab_size", maximum=MAX_VOCABULARY),
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=fields.count("num_hidden_layers", maximum=4096),
            num_heads=num_heads,
            num_kv_heads=fields.count("num_key_value_heads", num_heads, maximum=4096),
            head_dim=fields.count("head_dim", hidden_size // num_heads, maximum=1024),
            max_position_embeddings=fields.count("max_position_embeddings", 131072, maximum=1 << 21),
            rope_theta=_rope_theta(fields),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5, 1.0),
            tie_word_embeddings=fields.truth("tie_word_embeddings", True),
            moe=_moe(fields) if model_type == "ernie4_5_moe" else None,
            eos_token_ids=_eos_token_ids(folder, fields.document),
        )
        if config.num_heads % config.num_kv_heads:
            raise InvalidConfig(
                f"{path} has {config.num_heads} attention heads, not a multiple of its {config.num_kv_heads} key-value heads"
            )
        if config.head_dim % 2:
            raise InvalidConfig(f"{path} has head_dim {config.head_dim}; rotary embeddings need an even one")
        return config


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a JSON document; messages name its file."""

    path: Path
    document: Mapping[str, Any]

    def count(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = 1 << 20) -> int:
        value = self.document.get(key)
        if isinstance(value, list) and value:
            value = value[0]  # one value per modality, text first
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise InvalidConfig(
                f"{self.path} needs an integer {key} of at least {minimum} and at most {maximum}; it is {_shown(value)}"
            )
        return value

    def number(self, key: str, default: float, maximum: float = 1e15) -> float:
        value = self.document.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= maximum:  # nor NaN
            raise InvalidConfig(
                f"{self.path} needs a positive number {key} of at most {maximum:g}; it is {_shown(value)}"
            )
        return float(value)

    def truth(self, key: str, default: bool) -> bool:
        value = self.document.get(key, default)
        if not isinstance(value, bool):
            raise InvalidConfig(f"{self.path} needs true or false as {key}; it is {_shown(value)}")
        return value

    def require_default(self, key: str, default: object) -> None:
        value = self.document.get(key, default)
        if value is not None and (isinstance(value, bool) is not isinstance(default, bool) or value != default):
            raise InvalidConfig(f"{self.path} has {key} {_shown(value)}; only {default!r} is supported")


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> Mapping[str, Any]:
    """The JSON object in `path`. Raises InvalidConfig when it is missing or is none."""
    try:
        return read_object(path, max_bytes)
    except FileNotFoundError:
        raise InvalidConfig(f"{path} is missing; a checkpoint folder needs it") from None


def eos_ids(found: object, path: Path) -> tuple[int, ...]:
    """The ids of a file's eos_token_id: one, a list, or none. Raises InvalidConfig."""
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if len(ids) > MAX_EOS_IDS or not all(type(token) is int and 0 <= token < MAX_VOCABULARY for token in ids):
        raise InvalidConfig(f"{path} has eos_token_id {_shown(found)}; it must be integers, the ids of tokens")
    return tuple(ids)


def _shown(value: object) -> str:
    """Some characters of a value that may be huge."""
    try:
        return f"{value!r:.100}"
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a deep list
        return "huge"


def _rope_theta(fields: _Fields) -> float:
    """Base of the rotary frequencies; newer files nest it in rope_parameters."""
    nested = fields.document.get("rope_parameters") or fields.document.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise InvalidConfig(f"{fields.path} needs an object as rope_parameters or rope_scaling; it is {_shown(nested)}")
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        raise InvalidConfig(
            f"{fields.path} scales its rotary embeddings ({_shown(kind)}); only the default is supported"
        )
    return _Fields(fields.path, {**fields.document, **nested}).number("rope_theta", 500_000.0)


def _moe(fields: _Fields) -> MoeConfig:
    num_layers = fields.count("num_hidden_layers")
    last_layer = fields.count("moe_layer_end_index", -1, minimum=-1)
    moe = MoeConfig(
        num_experts=fields.count("moe_num_experts", maximum=65536),
        num_experts_per_token=fields.count("moe_k", maximum=65536),
        num_shared_experts=fields.count("moe_num_shared_experts", 0, minimum=0, maximum=1024),
        intermediate_size=fields.count("moe_intermediate_size"),
        first_layer=fields.count("moe_layer_start_index", 0, minimum=0),
        last_layer=num_layers - 1 if last_layer == -1 else last_layer,
        interval=fields.count("moe_layer_interval", 1),
        norm_min=fields.number("moe_norm_min", 1e-12, 1.0),
    )
    if moe.num_experts_per_token > moe.num_experts:
        raise InvalidConfig(
            f"{fields.path} has moe_k {moe.num_experts_per_token} above moe_num_experts {moe.num_experts}"
        )
    return moe


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """From generation_config.json (one id or a list), else from config.json; empty when neither names one."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    found = generation.get("eos_token_id")
    found = config.get("eos_token_id") if found is None else found
    return eos_ids(found, path if generation else folder / "config.json")
