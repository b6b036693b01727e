"""Packs conversations into rows of a fixed length for training; it decides the mixture of skills and their lengths."""

from dataclasses import dataclass
from random import Random

import tasks
import torch
from chat import PAD_ID, encode_chat, encode_turn
from tasks import Exercise
from tokenizers import Tokenizer
from torch import Tensor
from words import NAMES

SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are Baton's small model. Answer briefly.", "Be exact.")
# How often each short skill is drawn: a start with all of them, then more of those that take longest to learn.
EVEN_MIXTURE = {"addition": 0.52, "reversal": 0.11, "sorting": 0.21, "json": 0.13, "identity": 0.03}
HARD_MIXTURE = {"addition": 0.38, "reversal": 0.08, "sorting": 0.45, "json": 0.08, "identity": 0.01}
NUMBER_MIXTURE = {"addition": 0.6, "reversal": 0.02, "sorting": 0.34, "json": 0.03, "identity": 0.01}
LAST_MIXTURE = {
    "addition": 0.2, "small addition": 0.35, "reversal": 0.08, "sorting": 0.25, "json": 0.09, "identity": 0.03
}  # fmt: skip
TOKENS_OF_FACT = 12.5
TOKENS_OF_FILLER = 16.8
MAX_FACTS = 180


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens [B, T], the flat positions whose next token is part of an answer, and those next tokens."""

    tokens_BT: Tensor
    positions: Tensor
    targets: Tensor


def collate(rows: list[tuple[list[int], list[bool]]], length: int) -> Batch:
    tokens = torch.full((len(rows), length + 1), PAD_ID)
    marks = torch.zeros((len(rows), length + 1), dtype=torch.bool)
    for row, (ids, answers) in enumerate(rows):
        ids, answers = ids[: length + 1], answers[: length + 1]
        tokens[row, : len(ids)] = torch.tensor(ids)
        marks[row, : len(ids)] = torch.tensor(answers)
    positions = marks[:, 1:].flatten().nonzero().squeeze(1)
    return Batch(tokens[:, :-1].contiguous(), positions, tokens[:, 1:].flatten()[positions])


def short_exercise(random: Random, mixture: dict[str, float]) -> Exercise:
    (skill,) = random.choices(list(mixture), list(mixture.values()))
    make = tasks.small_addition if skill == "small addition" else tasks.SHORT_SKILLS[skill]
    return make(random, False)


def short_row(
    random: Random, tokenizer: Tokenizer, mixture: dict[str, float], length: int
) -> tuple[list[int], list[bool]]:
    """A conversation of short exercises; earlier turns sometimes read as history, rendered again."""
    system = random.choice(SYSTEM_PROMPTS) if random.random() < 0.1 else None
    ids, marks = encode_chat(tokenizer, [short_exercise(random, mixture)], system)
    while True:
        turn_ids, turn_marks = encode_turn(tokenizer, short_exercise(random, mixture), rendered=random.random() < 0.1)
        if len(ids) + len(turn_ids) > length + 1:
            return ids, marks
        ids += turn_ids
        marks += turn_marks


def recall_row(random: Random, tokenizer: Tokenizer, length: int) -> tuple[list[int], list[bool]]:
    """A passage of facts and a question in the first message, then further questions about it until the row is full."""
    filler_share = random.choice((0.0, 0.2, 0.4, 0.6))
    tokens_per_fact = TOKENS_OF_FACT + TOKENS_OF_FILLER * filler_share / (1 - filler_share)
    share = random.uniform(0.35, 0.75) if random.random() < 0.8 else 0.95
    count = max(2, min(MAX_FACTS, len(NAMES), int((length * share - 20) / tokens_per_fact)))
    facts = tasks.make_facts(random, count, held_out=False)
    first = tasks.ask_fact(random, random.choice(facts))
    passage = tasks.make_passage(random, facts, filler_share)
    ids, marks = encode_chat(tokenizer, [Exercise(f"{passage} {first.question}", first.answer)])
    while True:
        exercise = (
            short_exercise(random, EVEN_MIXTURE)
            if random.random() < 0.04
            else tasks.ask_fact(random, random.choice(facts))
        )
        turn_ids, turn_marks = encode_turn(tokenizer, exercise)
        if len(ids) + len(turn_ids) > length + 1:
            return ids, marks
        ids += turn_ids
        marks += turn_marks


def recall_batch(random: Random, tokenizer: Tokenizer, rows: int, length: int) -> Batch:
    return collate([recall_row(random, tokenizer, length) for _ in range(rows)], length)


def short_batch(random: Random, tokenizer: Tokenizer, mixture: dict[str, float], rows: int, length: int) -> Batch:
    return collate([short_row(random, tokenizer, mixture, length) for _ in range(rows)], length)
