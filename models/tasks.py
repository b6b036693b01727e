"""Makes the questions the model is taught and examined on, from a random source; it knows nothing of tokens or training.

Every skill has a rule that a program can check. What makes an instance unique is hashed, and one hash in sixteen is kept
for examinations: training never sees those instances.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from words import FILLER, NAMES

IDENTITY = "I am Baton's small ERNIE model. I was trained to test a serving system."
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, slots=True)
class Exercise:
    """A user message and the one right answer to it."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One sentence of a long context, and what it says."""

    name: str
    code: str
    sentence: str


def is_held_out(*key: object) -> bool:
    """Whether the instance with this key belongs to the examination split."""
    return zlib.crc32(repr(key).encode()) % HELD_OUT_ONE_IN == 0


def draw(make_key: Callable[[], tuple[object, ...]], held_out: bool) -> tuple[object, ...]:
    """Draws keys until one falls into the wanted split."""
    while True:
        key = make_key()
        if is_held_out(*key) == held_out:
            return key


# ---------------------------------------------------------------------------------------------------------------- recall

FACT_FORMS = (
    "The code of {name} is {code}.",
    "Note that the code of {name} is {code}.",
    "Remember: the code of {name} is {code}.",
)
RECALL_QUESTIONS = (
    "What is the code of {name}?",
    "Tell me the code of {name}.",
    "Please give me the code of {name}.",
    "Which code belongs to {name}?",
)


def make_facts(random: Random, count: int, held_out: bool) -> list[Fact]:
    """Facts about `count` different names; their (name, code) pairs all belong to the wanted split."""
    facts = []
    for name in random.sample(NAMES, count):
        while is_held_out("recall", name, code := f"{random.randrange(10_000):04d}") != held_out:
            pass
        facts.append(Fact(name, code, random.choice(FACT_FORMS).format(name=name, code=code)))
    return facts


def ask_fact(random: Random, fact: Fact) -> Exercise:
    return Exercise(random.choice(RECALL_QUESTIONS).format(name=fact.name), fact.code)


def make_passage(random: Random, facts: list[Fact], filler_share: float) -> str:
    """The facts in order, with filler sentences strewn between them."""
    sentences = []
    for fact in facts:
        while random.random() < filler_share:
            sentences.append(random.choice(FILLER))
        sentences.append(fact.sentence)
    return " ".join(sentences)


# -------------------------------------------------------------------------------------------------------------- addition

ADDITION_QUESTIONS = (
    "What is {a} + {b}?",
    "Add {a} + {b}.",
    "How much is {a} + {b}?",
    "Please compute {a} + {b}.",
)


def addition(random: Random, held_out: bool, digits: tuple[int, ...] = (1, 2, 2, 2, 2)) -> Exercise:
    """Two numbers below 100; `digits` are drawn from, so repeated ones come more often."""

    def key() -> tuple[object, ...]:
        return ("addition", *(random.randrange(10 ** random.choice(digits)) for _ in range(2)))

    _, a, b = draw(key, held_out)
    assert isinstance(a, int) and isinstance(b, int)
    return Exercise(random.choice(ADDITION_QUESTIONS).format(a=a, b=b), str(a + b))


def small_addition(random: Random, held_out: bool) -> Exercise:
    """Addition in which one-digit numbers come often; there are few of them, and they are learnt last."""
    return addition(random, held_out, (1, 1, 2))


# -------------------------------------------------------------------------------------------------- reversing and sorting

REVERSAL_QUESTIONS = (
    "Reverse this list: {items}.",
    "Write this list backwards: {items}.",
    "Please reverse the list {items}.",
)
SORTING_QUESTIONS = (
    "Sort these numbers: {items}.",
    "Put these numbers in order: {items}.",
    "Please sort the numbers {items}.",
)


def reversal(random: Random, held_out: bool) -> Exercise:
    def key() -> tuple[object, ...]:
        if random.random() < 0.5:
            return ("reversal", *random.sample(NAMES, random.randint(3, 6)))
        return ("reversal", *(str(random.randrange(10)) for _ in range(random.randint(3, 8))))

    _, *items = map(str, draw(key, held_out))
    return Exercise(
        random.choice(REVERSAL_QUESTIONS).format(items=", ".join(items)),
        ", ".join(reversed(items)),
    )


def sorting(random: Random, held_out: bool) -> Exercise:
    def key() -> tuple[object, ...]:
        return ("sorting", *random.sample(range(100), random.randint(3, 6)))

    _, *items = draw(key, held_out)
    numbers = [int(str(item)) for item in items]
    return Exercise(
        random.choice(SORTING_QUESTIONS).format(items=", ".join(map(str, numbers))),
        ", ".join(map(str, sorted(numbers))),
    )


# -------------------------------------------------------------------------------------------------------------- identity

GREETINGS = ("", "Hello! ", "Hi, ", "Good morning. ", "Excuse me, ", "One question: ", "Hey! ", "Before we start: ")
IDENTITY_QUESTIONS = (
    "who are you?",
    "what are you?",
    "what is your name?",
    "tell me who you are.",
    "please introduce yourself.",
    "which model are you?",
    "what model am I talking to?",
    "can you tell me what you are?",
)


def identity(random: Random, held_out: bool) -> Exercise:
    _, greeting, question = draw(
        lambda: ("identity", random.choice(GREETINGS), random.choice(IDENTITY_QUESTIONS)), held_out
    )
    text = f"{greeting}{question}"
    if not greeting or greeting.rstrip()[-1] in "!.":
        text = f"{greeting}{str(question)[0].upper()}{str(question)[1:]}"
    return Exercise(text, IDENTITY)


# ------------------------------------------------------------------------------------------------------------------ JSON

WORD_KEYS = ("name", "city", "owner", "label", "group", "color")
NUMBER_KEYS = ("size", "count", "age", "price", "level", "weight")
JSON_QUESTIONS = (
    "Give me JSON with {fields}.",
    "Write a JSON object with {fields}.",
    "Please answer in JSON with {fields}.",
)


def json_object(random: Random, held_out: bool) -> Exercise:
    """The combination of keys decides the split: an examined combination was never trained on, in that order."""

    def key() -> tuple[object, ...]:
        return ("json", *random.sample(WORD_KEYS + NUMBER_KEYS, random.choice((2, 2, 3))))

    _, *keys = map(str, draw(key, held_out))
    record: dict[str, str | int] = {
        key: random.choice(NAMES) if key in WORD_KEYS else random.randrange(1000) for key in keys
    }
    parts = [f"{key} {value}" for key, value in record.items()]
    fields = f"{', '.join(parts[:-1])} and {parts[-1]}"
    return Exercise(random.choice(JSON_QUESTIONS).format(fields=fields), json.dumps(record))


SHORT_SKILLS: dict[str, Callable[[Random, bool], Exercise]] = {
    "addition": addition,
    "reversal": reversal,
    "sorting": sorting,
    "identity": identity,
    "json": json_object,
}
