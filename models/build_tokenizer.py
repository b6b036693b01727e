"""Trains the byte-level BPE vocabulary on text of the tasks; it knows nothing of the network.

A digit and a punctuation mark are always one token of their own and a word may carry the blank before it, so numbers look
the same wherever they stand. All 256 bytes are in the vocabulary: any UTF-8 text survives encoding and decoding.
"""

from collections.abc import Iterator
from random import Random

import tasks
from chat import SPECIAL_TOKENS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from words import FILLER, NAMES

VOCABULARY_SIZE = 1408
PIECES = r" ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s"


def make_corpus(random: Random, exercises: int) -> Iterator[str]:
    """Text of every skill, with every name and every filler sentence often enough to earn their tokens."""
    for name in NAMES:
        for fact_form in tasks.FACT_FORMS:
            yield fact_form.format(name=name, code="") * 20
        yield f'"{name}" ' * 100
    for sentence in FILLER:
        yield f" {sentence}" * 40
    for question in tasks.RECALL_QUESTIONS:
        yield f"User: {question.format(name='')}\nAssistant: " * 100
    for _ in range(exercises):
        for make in tasks.SHORT_SKILLS.values():
            exercise = make(random, False)
            yield f"User: {exercise.question}\nAssistant: "
            yield exercise.answer


def build_tokenizer(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_corpus(Random(seed), exercises=2000), trainer)
    return tokenizer


def twin_tokens(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Pairs of tokens that are the same word, first with the blank before it and then without."""
    vocabulary = tokenizer.get_vocab()
    blank = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" ")[0][0]
    words = sorted(word for word in vocabulary if word.startswith(blank) and word.removeprefix(blank) in vocabulary)
    return [(vocabulary[word], vocabulary[word.removeprefix(blank)]) for word in words if word != blank]
