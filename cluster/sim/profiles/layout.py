"""Layouts of a worker by name: `tp1`, `tp4`, `ep8`, `ep8-tp2`, `ep24-r8`. What a name may say is what worker.parallel may."""

from __future__ import annotations

import re

from workers.config import ParallelConfig
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.parallel.layout import check

_PART = re.compile(r"(tp|ep|r)([1-9]\d{0,3})")
_MOST = {"tp": 64, "ep": 1024, "r": 1024}


def read_layout(text: str, config: ErnieConfig) -> ParallelConfig:
    """ep: ranks that share the experts; tp: ranks that share the heads of the same sequences; r: redundant experts.

    Attention is data-parallel over ep / tp parts. Raises InvalidConfig with one sentence for a name that says nothing, or a
    layout in which the model cannot be cut.
    """
    found: dict[str, int] = {}
    for part in text.lower().split("-"):
        match = _PART.fullmatch(part)
        if match is None or match[1] in found or int(match[2]) > _MOST[match[1]]:
            raise InvalidConfig(
                f"layout {text!r} must look like tp1, ep8 or ep8-tp2: ranks that share experts (ep) or heads (tp)"
            )
        found[match[1]] = int(match[2])
    parallel = ParallelConfig(
        expert_parallel=found.get("ep", 1), tensor_parallel=found.get("tp", 1), redundant_experts=found.get("r", 0)
    )
    try:
        check(parallel, config)
    except InvalidConfig as error:
        raise InvalidConfig(f"layout {text!r} does not suit the model: {error}") from None
    return parallel
