"""The published ERNIE 4.5 text models by name, their parameters by kind, and the bytes that each dtype stores them in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig, MoeConfig

_COMMON = ErnieConfig(
    vocab_size=103_424,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=18,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    moe=None,
    eos_token_ids=(2,),
)

MODELS = {
    "0.3B": _COMMON,
    "21B-A3B": replace(
        _COMMON,
        hidden_size=2560,
        intermediate_size=12_288,
        num_layers=28,
        num_heads=20,
        num_kv_heads=4,
        moe=MoeConfig(64, 6, 2, 1536, 1, 27, 1, 1e-12),
    ),
    "300B-A47B": replace(
        _COMMON,
        hidden_size=8192,
        intermediate_size=28_672,
        num_layers=54,
        num_heads=64,
        num_kv_heads=8,
        tie_word_embeddings=False,
        moe=MoeConfig(64, 8, 0, 3584, 3, 53, 1, 1e-12),
    ),
}
"""Dimensions as in the config.json of each published checkpoint; the block for multi-token prediction is left out."""


def published_model(name: str) -> ErnieConfig:
    """By name, in any case, with or without "ERNIE-4.5-" before it. Raises InvalidConfig."""
    wanted = name.lower().removeprefix("ernie-4.5-")
    for known, config in MODELS.items():
        if known.lower() == wanted:
            return config
    raise InvalidConfig(f"model {name!r} has no published profile: there are {', '.join(MODELS)}")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of parameters of one model, whole."""

    attention: int
    """Projections of all layers."""
    dense: int
    """Dense feed-forward layers."""
    shared: int
    """Shared experts of all mixture layers."""
    expert: int
    """One routed expert of one layer."""
    num_mixtures: int
    """Layers that are mixtures."""
    router: int
    """Gates of all mixture layers, in fp32."""
    table: int
    """The embedding, and as many for the output projection."""
    norms: int

    @staticmethod
    def of(config: ErnieConfig) -> Parameters:
        hidden, moe = config.hidden_size, config.moe
        mixtures = 0 if moe is None else sum(moe.has_layer(layer) for layer in range(config.num_layers))
        expert = 0 if moe is None else 3 * hidden * moe.intermediate_size
        return Parameters(
            attention=2 * hidden * config.head_dim * (config.num_heads + config.num_kv_heads) * config.num_layers,
            dense=3 * hidden * config.intermediate_size * (config.num_layers - mixtures),
            shared=0 if moe is None else mixtures * moe.num_shared_experts * expert,
            expert=expert,
            num_mixtures=mixtures,
            router=0 if moe is None else mixtures * moe.num_experts * hidden,
            table=config.vocab_size * hidden,
            norms=(2 * config.num_layers + 1) * hidden,
        )


@dataclass(frozen=True, slots=True)
class WeightType:
    """How weights are stored and multiplied. Embedding, output projection and norms stay bf16, routers fp32, KV bf16."""

    name: str
    dense_bytes: float
    """A parameter of attention, dense and shared feed-forward, scales included."""
    expert_bytes: float
    """A parameter of a routed expert, scales included."""
    multiplies_fp8: bool = False
    unpacks: bool = False
    """Integers become bf16 before they are multiplied."""


_GROUP_SCALE_BYTES = 2 / 64
"""A bf16 scale for a group of 64 weights."""

WEIGHT_TYPES = {
    each.name: each
    for each in (
        WeightType("bf16", 2, 2),
        WeightType("wint8", 1 + _GROUP_SCALE_BYTES, 1 + _GROUP_SCALE_BYTES, unpacks=True),
        WeightType("wint4", 1 + _GROUP_SCALE_BYTES, 0.5 + _GROUP_SCALE_BYTES, unpacks=True),
        WeightType("fp8", 1 + 4 / 128**2, 1 + 4 / 128**2, multiplies_fp8=True),
    )
}
"""wint4 keeps what every token reads at int8 and stores routed experts as int4, as the vendor's own engine does; fp8 has a scale for a block of 128 x 128."""


def weight_type(name: str) -> WeightType:
    """By name. Raises InvalidConfig."""
    found = WEIGHT_TYPES.get(name.lower())
    if found is None:
        raise InvalidConfig(f"dtype {name!r} has no published profile: there are {', '.join(WEIGHT_TYPES)}")
    return found
