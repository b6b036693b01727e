"""What a checkpoint proposes for sampling, which stands in for what clients leave open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workers.checkpoint_files import read_object
from workers.errors import InvalidConfig, InvalidRequest
from workers.request import SamplingParams


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
