"""The settings of the HTTP API: keys, bounds and the sampling parameters that apply when a client leaves them open."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from router.api.formats.formats import AUTO, check_parsers
from workers.bounds import Count, Natural, Seconds, Text
from workers.checkpoint_files import read_object
from workers.errors import InvalidConfig, InvalidRequest
from workers.request import SamplingParams

_ANY_VOCABULARY = 1 << 31


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Every bound the API keeps; checked where settings are read (cluster.settings.build)."""

    api_keys: tuple[Text, ...] = field(default=(), repr=False)
    """Bearer keys for everything but /health, /ready, /version, /metrics and /admin; empty: only clients of this host are served.
    A key, or its hash as `sha256:HEX`; only hashes are kept."""
    admin_keys: tuple[Text, ...] = field(default=(), repr=False)
    """Keys for /admin, which api_keys do not open; without any keys clients of this host may use it, with api_keys alone nobody."""
    insecure: bool = False
    """Without api_keys: listen on other addresses than loopback all the same, and serve whoever asks (not /admin)."""
    allowed_hosts: tuple[Text, ...] = ()
    """Without api_keys: names beside localhost that a request's Host may have, such as that of a proxy."""
    metrics: Literal["open", "key"] = "open"
    """Who may read /metrics, which names workers and says how busy they are: everybody, or who has an API key or an admin key."""
    max_body_bytes: Annotated[int, Ge(1024)] = 16 << 20
    """Larger request bodies are refused with 413."""
    max_open_body_bytes: Annotated[int, Ge(1024)] = 256 << 20
    """Of all bodies that are being received or wait to be read, beyond 64 KiB of each; a request that takes more is refused with 429."""
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
    allow_control_tokens: bool = False
    """Whether control tokens that stand in a message's text, such as <|end_of_sentence|>, are tokens; otherwise they are letters.
    In prompts of /v1/completions they always are tokens."""
    max_prompt_scores: Natural = 3 << 20
    """Entries of one request's prompt_logprobs: prompt tokens times n times (k + 1). 131,072 tokens with 20 alternatives need 2.8
    million; each is 8 bytes here and some 60 in the answer."""
    reasoning_parser: Text = AUTO
    """How the model writes its reasoning (router/api/formats/formats.py); auto: as its chat template shows."""
    tool_parser: Text = AUTO
    """How it writes calls of tools; auto likewise."""
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    """Used for what a client leaves open; see `load_sampling_defaults`. Token ids are checked when the vocabulary is known."""

    def __post_init__(self) -> None:
        self.check_sampling_defaults(_ANY_VOCABULARY)
        check_parsers(self.reasoning_parser, self.tool_parser)
        for name in ("api_keys", "admin_keys"):
            object.__setattr__(self, name, tuple(hashed(key) for key in getattr(self, name)))

    def check_sampling_defaults(self, vocab_size: int) -> None:
        """Raises InvalidConfig for defaults that no request could be run with."""
        try:
            self.sampling_defaults.validate(vocab_size)
        except InvalidRequest as error:
            raise InvalidConfig(f"router.api.sampling_defaults.{error}") from error


def hashed(key: str) -> str:
    """What is kept of a key: `sha256:HEX`. A hash stays as it is."""
    if re.fullmatch("sha256:[0-9a-f]{64}", key):
        return key
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def is_loopback(host: str) -> bool:
    """Whether a name or address means this host and is reached from it alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


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
