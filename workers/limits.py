"""How much one request may hold in the lists and texts of its parameters: a worker's settings, which its routers learn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

MAX_ENTRIES = 16_384
"""Of any list, whatever is set: a longer one is refused before its entries are read."""
Entries = Annotated[int, Ge(0), Le(MAX_ENTRIES)]
Pieces = Annotated[int, Ge(0), Le(1 << 20)]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """More is refused with 400. They are prepared before a request's first token; a token's cost does not grow with them."""

    stop_strings: Entries = 1024
    """OpenAI takes 4, vLLM any number."""
    stop_characters: Pieces = 8192
    """Of all stop strings together."""
    stop_token_ids: Entries = 1024
    bad_words: Entries = 1024
    bad_word_tokens: Pieces = 8192
    """Of all bad words together; a word that is given as text has two forms, which both count."""
    logit_bias: Entries = 1024
    """OpenAI takes 300."""
    allowed_token_ids: Entries = 1024


DEFAULT_LIMITS = RequestLimits()
