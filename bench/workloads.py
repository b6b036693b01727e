"""What bench/engine.py asks of every engine: prompts, batches, contexts, and their names in tables. Pure."""

from __future__ import annotations

from dataclasses import dataclass

DECODE_PROMPT = 128
"""Tokens of each prompt of a decode measurement, unless its name says more."""


@dataclass(frozen=True)
class Workload:
    """A prompt to its first token, or steps in which each of `batch` prompts of `context` tokens gets one more."""

    kind: str
    """prefill or decode."""
    batch: int
    context: int

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.context}"
        return f"decode {self.batch}" if self.context == DECODE_PROMPT else f"decode {self.batch} at {self.context}"

    @property
    def busy_name(self) -> str:
        """The same beside a process that keeps one core busy."""
        return f"{self.name}, one core busy"


PREFILLS = (Workload("prefill", 1, 512), Workload("prefill", 1, 2048))
DECODES = (
    Workload("decode", 1, DECODE_PROMPT),
    Workload("decode", 8, DECODE_PROMPT),
    Workload("decode", 32, DECODE_PROMPT),
)
SHORT = (*PREFILLS, *DECODES)
LONG = (
    Workload("decode", 1, 8192),
    Workload("decode", 8, 8192),
    Workload("decode", 1, 32768),
    Workload("prefill", 1, 16384),
)
BESIDE_A_BUSY_CORE = (PREFILLS[0], DECODES[0], DECODES[1])

LONG_STEPS = 8
"""Decode steps at a long context: they are long, and the context hardly grows."""
MAX_LEN = 40960
"""Positions of every checkpoint: the longest workload, and room."""
SHORT_POOL_TOKENS = 32 * 768
LONG_POOL_TOKENS = 8 * (8192 + 512)
"""KV room of engines that reserve it: for 32 sequences of 768 tokens, for 8 of 8,192 and for one of 32,768."""
