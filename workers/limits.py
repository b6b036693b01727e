"""How much one request may hold in the lists and texts of its parameters: a worker's settings, which its routers learn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

ALTERNATIVES = 20
"""Of each token, that every worker says if it is asked."""
MAX_ALTERNATIVES = 2048
"""Whatever is set: each takes some microseconds and 100 bytes in a worker and in a router."""
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
    logprobs: Annotated[int, Ge(ALTERNATIVES), Le(MAX_ALTERNATIVES)] = ALTERNATIVES
    """Alternatives of a token (`top_logprobs`, `prompt_logprobs`) and tokens in `logprob_token_ids`. -1, all of the vocabulary, is taken
    where that is no more."""


DEFAULT_LIMITS = RequestLimits()
