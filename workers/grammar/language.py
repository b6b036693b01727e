"""The language that grammars are written in, Lark's as llguidance reads it, and what reading one may take. Knows no vocabulary.

The limits count steps of work, not seconds: what is refused here is refused everywhere, on every machine and in every company.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import llguidance

MISSING = "structured output needs the package llguidance: pip install 'baton-serve[structured]'"


@cache
def engine_name() -> str:
    """Library and version that read grammars here; empty: there is none. Workers that differ in it draw other tokens."""
    if importlib.util.find_spec("llguidance") is None:
        return ""
    return f"llguidance {importlib.metadata.version('llguidance')}"


@cache
def limits() -> llguidance.LLParserLimits:
    """About 20 ms of reading, 10 ms of a token, 64 MiB of one sequence at the worst, by the library's own figures."""
    import llguidance

    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=32_000,
        max_grammar_size=200_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def said(error: str) -> str:
    """The library's message without the lines of the grammar that it shows."""
    return error.split("\n   1 | ")[0].split("; following special tokens")[0].strip()[:1000]
