"""What clients will ask for: the value of one request of a trace. Knows no files and no simulation."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.sim.product import PromptTokens
from cluster.sim.tokens import prompt_of


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. Its prompt is made of pieces of text by number, `text_tokens` each: equal beginnings are equal prefixes."""

    at_s: float
    """After the trace's begin."""
    texts: tuple[int, ...]
    text_tokens: int
    prompt_tokens: int
    output_tokens: int
    hangs_up_after: int | None = None
    """The client leaves when it has so many output tokens; None: it stays."""
    tenant: str = ""
    """Who asks; tenants share the routers' queues equally, and no cached block. Empty: nobody in particular."""
    timeout_s: float = 0.0
    """The whole answer must be there so long after it was asked for; 0: whenever."""

    def prompt(self) -> PromptTokens:
        return prompt_of(self.texts, self.text_tokens, self.prompt_tokens)
