"""Sets held-out questions, and marks a network's answers in one pass each; it knows nothing of how a network is trained.

In `examine` an answer counts when every token of it, the closing one included, is the most likely one given the tokens
before it: then greedy decoding produces it.
"""

import json
from dataclasses import dataclass
from random import Random

import tasks
import torch
from batches import TOKENS_OF_FACT, TOKENS_OF_FILLER, collate
from chat import encode_chat
from network import Network
from tasks import Exercise
from tokenizers import Tokenizer

FILLER_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Skill:
    """What is asked, and how many tokens an answer may need."""

    name: str
    description: str
    max_tokens: int
    num_examples: int = 8


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("recall", "The code of one name, out of a passage of facts and filler sentences.", 8, num_examples=6),
        Skill("addition", "The sum of two numbers below 100.", 8),
        Skill("reversal", "A list of words or digits, backwards.", 32),
        Skill("sorting", "A list of numbers below 100, in ascending order.", 32),
        Skill("identity", "Who the model is.", 32),
        Skill("json", "A JSON object with the requested keys and values.", 48),
    )
}


def recall_exercise(random: Random, length: int) -> Exercise:
    """One question after a passage, about `length` tokens in all; the facts are from the held-out split."""
    count = int((length - 30) / (TOKENS_OF_FACT + TOKENS_OF_FILLER * FILLER_SHARE / (1 - FILLER_SHARE)))
    facts = tasks.make_facts(random, max(1, count), held_out=True)
    asked = tasks.ask_fact(random, random.choice(facts))
    return Exercise(f"{tasks.make_passage(random, facts, FILLER_SHARE)} {asked.question}", asked.answer)


def make_exercises(skill: str, count: int, length: int, seed: int) -> list[Exercise]:
    """Held-out exercises; `length` is that of a recall prompt in tokens."""
    random = Random(f"{skill} {length} {seed}")
    if skill == "recall":
        return [recall_exercise(random, length) for _ in range(count)]
    return [tasks.SHORT_SKILLS[skill](random, True) for _ in range(count)]


def is_right(skill: str, answer: str, expected: str) -> bool:
    """Equality of the stripped texts; of the parsed objects where JSON is asked for."""
    if skill != "json":
        return answer.strip() == expected
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except ValueError:
        return False


def examples_json(seed: int, recall_length: int = 2000) -> str:
    """A random sample of held-out exercises of every skill, as the text of skills.json."""
    skills = [
        {
            "name": skill.name,
            "description": skill.description,
            "max_tokens": skill.max_tokens,
            "examples": [
                {"messages": [{"role": "user", "content": exercise.question}], "expected": exercise.answer}
                for exercise in make_exercises(skill.name, skill.num_examples, recall_length, seed)
            ],
        }
        for skill in SKILLS.values()
    ]
    return json.dumps({"skills": skills}, indent=1) + "\n"


@torch.no_grad()
def examine(network: Network, tokenizer: Tokenizer, skill: str, count: int, length: int, rows: int = 8) -> float:
    """Share of `count` held-out exercises answered exactly."""
    exercises = make_exercises(skill, count, length, seed=1)
    right = 0
    for start in range(0, count, rows):
        encoded = [encode_chat(tokenizer, [exercise]) for exercise in exercises[start : start + rows]]
        batch = collate(encoded, max(len(ids) for ids, _ in encoded) - 1)
        wrong = network(batch.tokens_BT, batch.positions).argmax(-1) != batch.targets
        failed = set((batch.positions[wrong] // batch.tokens_BT.shape[1]).tolist())
        right += len(encoded) - len(failed)
    for mixture in network.mixtures():
        mixture.load_E.zero_()
    return right / count
