"""Draws requests by seed: conversations that grow from turn to turn, with lengths spread as in published traces, and loads that shift. Knows no files."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

from cluster.sim.load import TraceRequest
from cluster.sim.product import InvalidConfig

PREFIX = "generated"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Lengths are log-normal around their means. With `shift` prompts are four times as long and answers a quarter as long in the first and the
    last third of the trace, and the other way round in the middle one."""

    requests: int = 1000
    rate: float = 4.0
    """Requests a second, arriving independently of each other."""
    prompt: int = 4000
    """Mean tokens of the prompt of a first turn."""
    output: int = 300
    """Mean tokens of an answer."""
    turns: float = 1.6
    """Mean turns of a conversation; each one repeats what was said before."""
    shared: int = 512
    """Tokens with which all conversations of a kind begin."""
    pause: float = 20.0
    """Mean seconds between turns."""
    hangups: float = 0.0
    """Share of clients that leave in the middle of their answers."""
    shift: int = 0
    text: int = 64
    """Tokens of a piece of text."""


_KINDS = 4
_SPREAD = 0.8
_FACTOR = 4.0


def recipe_of(text: str) -> Recipe:
    """From `generated` or `generated:name=value,...`. Raises InvalidConfig."""
    _, _, given = text.partition(":")
    types = {field.name: field.type for field in fields(Recipe)}
    values: dict[str, float | int] = {}
    for word in filter(None, given.split(",")):
        name, _, value = word.partition("=")
        if name not in types:
            raise InvalidConfig(f"a generated trace takes {', '.join(types)}; {name!r} is none of these")
        try:
            values[name] = int(value) if types[name] == "int" else float(value)
        except ValueError:
            raise InvalidConfig(f"{name} of a generated trace must be a number; it is {value!r}") from None
        least = 0 if name in ("hangups", "shared", "shift", "pause") else 3 if name == "text" else 1e-6
        if not least <= values[name] < 1e8:
            raise InvalidConfig(f"{name} of a generated trace must be at least {least:g}; it is {value}")
    return Recipe(**values)  # type: ignore[arg-type]


def generate(recipe: Recipe, seed: int, max_model_len: int) -> Iterator[TraceRequest]:
    """Requests in order of arrival, none longer than the model allows."""
    rng = random.Random(f"{seed}/trace")
    duration_s = recipe.requests / recipe.rate
    begin_s, texts = 0.0, _KINDS * (1 + recipe.shared // recipe.text)
    turns: list[tuple[float, int, tuple[int, ...]]] = []
    """(when, conversation, texts so far)"""
    num_asked = num_begun = 0
    while num_asked < recipe.requests:
        if not turns or begin_s <= turns[0][0]:
            kind = rng.randrange(_KINDS)
            count = recipe.shared // recipe.text
            shared = tuple(range(kind * (count + 1), kind * (count + 1) + count))
            num_begun += 1
            heapq.heappush(turns, (begin_s, num_begun, shared))
            begin_s += rng.expovariate(recipe.rate / recipe.turns)
            continue
        at_s, conversation, said = heapq.heappop(turns)
        factor = _factor(recipe, at_s / duration_s)
        num_new = max(1, round(_length(rng, recipe.prompt * factor) / recipe.text))
        num_output = max(1, round(_length(rng, recipe.output / factor)))
        most = (max_model_len - num_output - 1) // recipe.text - len(said)
        num_new = min(num_new, most)
        if num_new < 1 or num_output >= max_model_len // 2:
            continue
        prompt = (*said, *range(texts, texts + num_new))
        texts += num_new
        num_tokens = len(prompt) * recipe.text - rng.randrange(recipe.text)
        leaves = rng.randrange(1, num_output + 1) if rng.random() < recipe.hangups else None
        yield TraceRequest(at_s, prompt, recipe.text, max(1, num_tokens), num_output, leaves)
        num_asked += 1
        if rng.random() < 1 - 1 / recipe.turns:
            num_answer = -(-num_output // recipe.text)
            answered = (*prompt, *range(texts, texts + num_answer))
            texts += num_answer
            next_s = at_s + rng.expovariate(1 / recipe.pause) if recipe.pause else at_s
            heapq.heappush(turns, (next_s, conversation, answered))


def _length(rng: random.Random, mean: float) -> float:
    return mean * rng.lognormvariate(-(_SPREAD**2) / 2, _SPREAD)


def _factor(recipe: Recipe, part: float) -> float:
    """How much longer prompts are now, and shorter answers."""
    if not recipe.shift:
        return 1.0
    return 1 / _FACTOR if 1 / 3 <= part < 2 / 3 else _FACTOR
