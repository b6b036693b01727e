"""The settings of the HTTP API: keys, bounds and the sampling parameters that apply when a client leaves them open."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from workers.errors import InvalidConfig, InvalidRequest
from workers.request import SamplingParams


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Every bound the API keeps. Raises InvalidConfig on construction when a value cannot work."""

    api_keys: tuple[str, ...] = ()
    """Bearer keys for everything but /health, /ready, /version and /metrics; empty: no key is asked for."""
    admin_keys: tuple[str, ...] = ()
    """Keys for /admin; empty: the api_keys open it too."""
    max_body_bytes: int = 16 << 20
    """Larger request bodies are refused with 413."""
    max_n: int = 128
    """Choices per prompt."""
    max_prompts: int = 1024
    """Prompts in one completions request."""
    max_choices: int = 2048
    """Prompts times n of one request."""
    max_pending_outputs: int = 256
    """Outputs of one request that wait for a slow client; then its streams are no longer read."""
    heartbeat_s: float = 15.0
    """A stream that is silent for this long sends an SSE comment, so that proxies keep it open."""
    offload_bytes: int = 32 << 10
    """Bodies larger than this are validated and tokenized in a thread, so that other streams do not stall."""
    max_prompt_scores: int = 3 << 20
    """Entries of one request's prompt_logprobs: prompt tokens times n times (k + 1). 131,072 tokens with 20 alternatives need 2.8
    million; each is 8 bytes here and some 60 in the answer."""
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    """Used for what a client leaves open; see `load_sampling_defaults`."""

    def __post_init__(self) -> None:
        checks = (
            (all(self.api_keys), "api_keys", "must not contain an empty key"),
            (all(self.admin_keys), "admin_keys", "must not contain an empty key"),
            (self.max_body_bytes >= 1024, "max_body_bytes", "must be at least 1024"),
            (self.max_n >= 1, "max_n", "must be at least 1"),
            (self.max_prompts >= 1, "max_prompts", "must be at least 1"),
            (self.max_choices >= 1, "max_choices", "must be at least 1"),
            (self.max_pending_outputs >= 1, "max_pending_outputs", "must be at least 1"),
            (self.max_prompt_scores >= 0, "max_prompt_scores", "must not be negative"),
            (self.heartbeat_s > 0, "heartbeat_s", "must be positive"),
            (self.offload_bytes >= 0, "offload_bytes", "must not be negative"),
        )
        for ok, name, what in checks:
            if not ok:
                raise InvalidConfig(f"api.{name} {what}")


def load_sampling_defaults(checkpoint: str | Path) -> SamplingParams:
    """Defaults of a checkpoint's generation_config.json; `do_sample: false` there means greedy.

    A missing file gives the API's own defaults. Raises InvalidConfig when a value is out of range.
    """
    path = Path(checkpoint) / "generation_config.json"
    if not path.is_file():
        return SamplingParams()
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidConfig(f"{path} is not JSON: {error}") from error
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: written[name] for name in names if written.get(name) is not None}
    if written.get("do_sample") is False:
        chosen["temperature"] = 0.0
    if chosen.get("top_k", 0) == -1:
        chosen["top_k"] = 0
    try:
        defaults = replace(SamplingParams(), **chosen)
        defaults.validate(vocab_size=1)
    except (InvalidRequest, TypeError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
    return defaults
