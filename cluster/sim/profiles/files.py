"""Profiles as JSON files, and by name: what `--profile` takes. A broken file gets one sentence that names the field."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.settings import build
from cluster.sim.profiles.accelerators import Accelerator, Efficiency
from cluster.sim.profiles.fitted import FittedCost, Parts
from cluster.sim.profiles.layout import read_layout
from cluster.sim.profiles.models import published_model, weight_type
from cluster.sim.profiles.profile import Profile
from cluster.sim.profiles.published import profile_of, published_profile
from cluster.sim.profiles.roofline import RooflineCost
from workers.config import Count, Delay, Text
from workers.errors import InvalidConfig

FORMAT = "baton-profile-1"
MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class RooflineFile:
    """A profile that is computed from a data sheet; change rates and efficiencies to what you know better."""

    format: Literal["baton-profile-1"]
    kind: Literal["roofline"]
    name: Text
    model: Text
    dtype: Text
    layout: Text
    accelerator: Accelerator
    efficiency: Efficiency = field(default_factory=Efficiency)


@dataclass(frozen=True, slots=True)
class FittedFile:
    """A profile that `baton profile` measured. `evidence` says where, when and how well it fits; nothing reads it but people."""

    format: Literal["baton-profile-1"]
    kind: Literal["fitted"]
    name: Text
    model: Text
    parts: Parts
    kv_bytes_per_token: Count
    num_blocks: Count
    max_batched_tokens: Count
    max_num_seqs: Count
    max_model_len: Count
    transfer_latency_s: Delay
    transfer_bytes_per_s: Count
    router_s: Delay
    control_latency_s: Delay
    router_token_s: Delay = 0.0
    connect_s: Delay = 0.0
    block_size: Count = 64
    evidence: dict[str, Any] = field(default_factory=dict)


def load_profile(text: str) -> Profile:
    """A published profile by name (`h200:21B-A3B:bf16:tp1`), or one in a file. Raises InvalidConfig."""
    path = Path(text)
    if not path.is_file():
        if ":" in text:
            return published_profile(text)
        raise InvalidConfig(f"profile {text!r} is neither a file nor a name such as h200:21B-A3B:bf16:tp1")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidConfig(f"{text} is larger than {MAX_FILE_BYTES >> 20} MiB: it is no profile")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{text} cannot be read as JSON: {error}") from None
    return read_profile(values, text)


def read_profile(values: Any, where: str) -> Profile:
    """From the JSON document of a file; `where` names it in messages. Raises InvalidConfig."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InvalidConfig(f'{where} is no profile: its "format" must be "{FORMAT}"')
    match values.get("kind"):
        case "roofline":
            rooflined = build(RooflineFile, values, where)
            config = published_model(rooflined.model)
            layout = read_layout(rooflined.layout, config)
            cost = RooflineCost(
                rooflined.accelerator, config, weight_type(rooflined.dtype), layout, rooflined.efficiency
            )
            return profile_of(cost, rooflined.name, rooflined.model)
        case "fitted":
            fitted = build(FittedFile, values, where)
            if fitted.num_blocks * fitted.block_size < fitted.max_model_len:
                raise InvalidConfig(
                    f"{where}.num_blocks must hold a request of max_model_len {fitted.max_model_len} tokens; it is {fitted.num_blocks}"
                )
            return Profile(
                name=fitted.name,
                model=fitted.model,
                cost=FittedCost(fitted.parts),
                kv_bytes_per_token=fitted.kv_bytes_per_token,
                block_size=fitted.block_size,
                num_blocks=fitted.num_blocks,
                max_batched_tokens=fitted.max_batched_tokens,
                max_num_seqs=fitted.max_num_seqs,
                max_model_len=fitted.max_model_len,
                transfer_latency_s=fitted.transfer_latency_s,
                transfer_bytes_per_s=float(fitted.transfer_bytes_per_s),
                router_s=fitted.router_s,
                control_latency_s=fitted.control_latency_s,
                router_token_s=fitted.router_token_s,
                connect_s=fitted.connect_s,
            )
        case other:
            raise InvalidConfig(f'{where} must have a "kind" of roofline or fitted; it is {other!r}')


def published_file(name: str) -> dict[str, Any]:
    """The document of a published profile, to be written, changed and read again. Raises InvalidConfig."""
    profile = published_profile(name)
    cost = profile.cost
    assert isinstance(cost, RooflineCost)
    _, _, dtype, layout = profile.name.split(":")
    return {
        "format": FORMAT,
        "kind": "roofline",
        "name": profile.name,
        "model": profile.model,
        "dtype": dtype,
        "layout": layout,
        "accelerator": asdict(cost.accelerator),
        "efficiency": asdict(cost.efficiency),
    }


def require_model(profile: Profile, model: str) -> None:
    """Raises InvalidConfig when a profile was made for another model than the one that is asked about."""
    if model and profile.model != "any" and _plain(profile.model) != _plain(model):
        raise InvalidConfig(f"profile {profile.name} is for model {profile.model}, not for {model}")


def _plain(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower().removeprefix("ernie-4.5-")
