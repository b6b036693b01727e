"""Answers drawn at random under generated JSON schemas: every one that ends by itself is valid.

BATON_FUZZ_EXAMPLES=2000 checks so many.
"""

from __future__ import annotations

import json
import os
from typing import Any

import jsonschema
from byte_tokens import EOS, TOKENS, vocabulary
from json_schemas import SchemaMaker
from llguidance import LLMatcher

from router.api.formats.grammars import json_rule, whole
from workers.grammar.language import limits
from workers.grammar.sequence_constraint import SequenceConstraint
from workers.request import SamplingParams
from workers.sampling.constraint import tokens_in
from workers.sampling.noise import noise_key

MAX_TOKENS = 1500
COUNT = int(os.environ.get("BATON_FUZZ_EXAMPLES", "60"))


def answer(schema: dict[str, Any], seed: int) -> str | None:
    """Drawn from all that the schema allows, token by token; None: it has not ended within MAX_TOKENS."""
    grammar = whole(json_rule(schema))
    constraint = SequenceConstraint(SamplingParams(grammar=grammar), TOKENS.vocab_size, (EOS,))
    matcher = LLMatcher(vocabulary().tokenizer, grammar, log_level=0, limits=limits())
    assert not matcher.is_error(), (matcher.get_error(), schema)
    constraint.begin(matcher)
    drawn: list[int] = []
    while len(drawn) < MAX_TOKENS:
        mask = constraint.allowed(drawn)
        assert mask is not None and not constraint.error, (constraint.error, schema)
        tokens = tokens_in(mask)
        token = EOS if EOS in tokens else int(tokens[noise_key(seed, 0, len(drawn)) % len(tokens)])
        if token == EOS:
            return TOKENS.text(drawn)
        drawn.append(token)
    return None


def check(first: int, count: int) -> int:
    """How many answers ended."""
    ended = 0
    for seed in range(first, first + count):
        schema = SchemaMaker(seed).schema()
        text = answer(schema, seed)
        if text is not None:
            ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return ended


def test_answers_under_generated_schemas_are_valid() -> None:
    assert check(0, COUNT) >= 0.9 * COUNT
