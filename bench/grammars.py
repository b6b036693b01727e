"""Times what a grammar adds to drawing tokens at a vocabulary of ERNIE's size: reading it, one mask, one step of a batch.

python bench/grammars.py --rows 32 --vocab 103424

The vocabulary is made: every byte, then words of random letters, digits, blanks and signs of JSON, as long as ERNIE's are. Documents are those
that the grammar allows, drawn at random. Times are the thread's own processor time, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
import torch

from router.api.formats.grammars import json_rule, whole
from workers.grammar.grammars import Grammars
from workers.grammar.sequence_constraint import SequenceConstraint
from workers.grammar.vocabulary import GrammarVocabulary
from workers.model.native.build import build, default_cache_folder
from workers.model.native.draw import NativeRowKernel
from workers.model.native.library import Library
from workers.request import SamplingParams
from workers.runner import SampleSpec
from workers.sampling.constraint import tokens_in
from workers.sampling.edits import EditTracker
from workers.sampling.sampler import sample

EOS = 2
_TEXT = {"type": "string", "maxLength": 60}
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99999},
        "kind": {"enum": ["order", "return", "question"]},
        "name": {**_TEXT, "minLength": 1},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "price": {"type": "number", "minimum": 0, "maximum": 10000},
        "paid": {"type": "boolean"},
        "address": {
            "type": "object",
            "properties": {"street": _TEXT, "city": _TEXT},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": _TEXT, "maxItems": 5},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 5},
        "note": {"type": ["string", "null"], "maxLength": 200},
    },
    "required": ["id", "kind", "name", "code", "price", "paid", "address", "tags", "sizes", "note"],
    "additionalProperties": False,
}
GRAMMARS = {
    "object of ten fields": whole(json_rule(SCHEMA)),
    "any JSON object": whole(json_rule({"type": "object"})),
    "regular expression": r"start: /[A-Z][a-z]{2,12}( [a-z]{2,12}){3,30}\./",
}
_SIGNS = ('"', '":', '",', '": ', '", "', "{", "}", "}}", "},", "[", "]", "],", "\n", " ", "  ", "\n  ", ". ", ", ")


class MadeTokens:
    """Implements workers.grammar.vocabulary.TokenTable."""

    added_token_ids = frozenset(range(10))

    def __init__(self, vocab_size: int) -> None:
        dice = random.Random(1)
        words = dict.fromkeys([bytes((byte,)) for byte in range(256)] + [sign.encode() for sign in _SIGNS])
        while len(words) < vocab_size - 10:
            letters = "".join(dice.choices("etaoinshrdlcumwfgypbvk", k=dice.randint(2, 9)))
            kind = dice.random()
            if kind < 0.15:
                letters = "".join(dice.choices("0123456789", k=dice.randint(2, 6)))
            elif kind < 0.3:
                letters = "".join(chr(dice.randint(0x4E00, 0x9FA5)) for _ in range(dice.randint(1, 4)))
            elif kind < 0.5:
                letters = letters.capitalize()
            words[((" " if dice.random() < 0.4 else "") + letters).encode()] = None
        self._bytes = [b""] * 10 + list(words)
        self.vocab_size = vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def encode(self, text: str) -> list[int]:
        return [10 + byte for byte in text.encode()]


def begun(grammars: Grammars, number: int, params: SamplingParams) -> SequenceConstraint:
    made = grammars.begin(number, params)
    while not made.is_ready:
        grammars.wait(1.0)
    grammars.poll(0.0)
    return made


def time_tokens(grammars: Grammars, name: str, grammar: str) -> None:
    """What each token of twenty documents takes."""
    params = SamplingParams(temperature=1.0, seed=1, grammar=grammar)
    start = time.perf_counter()
    begun(grammars, 0, params)
    read_ms = 1e3 * (time.perf_counter() - start)
    spent, dice = [], random.Random(3)
    for number in range(20):
        constraint = begun(grammars, number, params)
        drawn: list[int] = []
        while len(drawn) < 300:
            start = time.thread_time()
            mask = constraint.allowed(drawn)
            spent.append(time.thread_time() - start)
            assert mask is not None
            allowed = tokens_in(mask)
            if EOS in allowed:
                break
            drawn.append(int(dice.choice(allowed)))
    us = 1e6 * np.array(spent)
    print(
        f"{name}: read in {read_ms:.1f} ms; matcher and mask of a token: mean {us.mean():.0f} us, median {np.median(us):.0f}, "
        f"99 % {np.percentile(us, 99):.0f}, worst {us.max():.0f} ({len(us)} tokens)"
    )


def time_steps(grammars: Grammars, num_rows: int, vocab: int, step_ms: float) -> None:
    """What masks add to the draws of a batch whose rows all follow the large schema."""
    kernel = NativeRowKernel(Library(build(default_cache_folder())))
    logits_RV = torch.randn(num_rows, vocab)
    grammar = GRAMMARS["object of ten fields"]
    params = [SamplingParams(seed=row, temperature=1.0, grammar=grammar) for row in range(num_rows)]
    free = [SamplingParams(seed=row, temperature=1.0) for row in range(num_rows)]
    trackers = [EditTracker(one, (), begun(grammars, 100 + row, one)) for row, one in enumerate(params)]
    outputs: list[list[int]] = [[] for _ in params]
    spent = np.zeros(3)
    num_steps = 60
    for step in range(num_steps):
        bound = [SampleSpec(one, 0, step, (), ()) for one in params]
        plain = [SampleSpec(one, 0, step, (), ()) for one in free]
        times = [time.thread_time()]
        for spec, tracker, output in zip(bound, trackers, outputs, strict=True):
            spec.edits = tracker.edits(output)
        times.append(time.thread_time())
        found = sample(logits_RV, bound, kernel)
        times.append(time.thread_time())
        sample(logits_RV, plain, kernel)
        times.append(time.thread_time())
        spent += 1e3 * np.diff(times) / num_steps
        for output, drawn in zip(outputs, found, strict=True):
            if drawn.token_id != EOS:
                output.append(drawn.token_id)
    masks_ms, bound_ms, plain_ms = spent
    print(
        f"a step of {num_rows} rows: masks {masks_ms:.2f} ms, the draw with them {bound_ms:.2f} ms, without {plain_ms:.2f} ms"
    )
    if step_ms:
        added_ms = masks_ms + bound_ms - plain_ms
        print(f"that adds {added_ms:.2f} ms to a step of {step_ms:g} ms: {100 * added_ms / (step_ms + added_ms):.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=103_424)
    parser.add_argument("--step-ms", type=float, default=0.0, help="of a step of decode without grammars")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = MadeTokens(args.vocab)
    start = time.perf_counter()
    vocabulary = GrammarVocabulary(tokens, args.vocab, (EOS,))
    print(f"a vocabulary of {args.vocab} tokens is prepared in {time.perf_counter() - start:.2f} s")
    grammars = Grammars(vocabulary, args.vocab, (EOS,), time.monotonic)
    for name, grammar in GRAMMARS.items():
        time_tokens(grammars, name, grammar)
    time_steps(grammars, args.rows, args.vocab, args.step_ms)


if __name__ == "__main__":
    main()
