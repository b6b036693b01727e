"""The settings of the HTTP API: keys, bounds and the sampling parameters that apply when a client leaves them open."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from workers.bounds import Count, Natural, Seconds, Text
from workers.checkpoint_files import read_object
from workers.errors import InvalidConfig, InvalidRequest
from workers.request import SamplingParams

_ANY_VOCABULARY = 1 << 31


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Every bound the API keeps; checked where settings are read (cluster.settings.build)."""

    api_keys: tuple[Text, ...] = field(default=(), repr=False)
    """Bearer keys for everything but /health, /ready, /version and /metrics; empty: no key is asked for."""
    admin_keys: tuple[Text, ...] = field(default=(), repr=False)
    """Keys for /admin; empty: the api_keys open it too."""
    max_body_bytes: Annotated[int, Ge(1024)] = 16 << 20
    """Larger request bodies are refused with 413."""
    max_n: Count = 128
    """Choices per prompt."""
    max_prompts: Count = 1024
    """Prompts in one completions request."""
    max_choices: Count = 2048
    """Prompts times n of one request."""
    heartbeat_s: Seconds = 15.0
    """A stream that is silent for this long sends an SSE comment, so that proxies keep it open."""
    offload_bytes: Natural = 4 << 10
    """Bodies larger than this are validated and tokenized in a thread, so that other streams do not stall."""
    max_prompt_scores: Natural = 3 << 20
    """Entries of one request's prompt_logprobs: prompt tokens times n times (k + 1). 131,072 tokens with 20 alternatives need 2.8
    million; each is 8 bytes here and some 60 in the answer."""
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    """Used for what a client leaves open; see `load_sampling_defaults`. Token ids are checked when the vocabulary is known."""

    def __post_init__(self) -> None:
        self.check_sampling_defaults(_ANY_VOCABULARY)

    def check_sampling_defaults(self, vocab_size: int) -> None:
        """Raises InvalidConfig for defaults that no request could be run with."""
        try:
            self.sampling_defaults.validate(vocab_size)
        except InvalidRequest as error:
            raise InvalidConfig(f"router.api.sampling_defaults.{error}") from error


def load_sampling_defaults(checkpoint: str | Path) -> SamplingParams:
    """Defaults of a checkpoint's generation_config.json; `do_sample: false` there means greedy.

    A missing file gives the API's own defaults. Raises InvalidConfig when a value is out of range.
    """
    path = Path(checkpoint) / "generation_config.json"
    try:
        written = read_object(path)
    except FileNotFoundError:
        return SamplingParams()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: written[name] for name in names if written.get(name) is not None}
    if written.get("do_sample") is False:
        chosen["temperature"] = 0.0
    if chosen.get("top_k", 0) == -1:
        chosen["top_k"] = 0
    try:
        defaults = replace(SamplingParams(), **chosen)
        defaults.validate(vocab_size=1)
    except (InvalidRequest, TypeError, OverflowError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
    return defaults
