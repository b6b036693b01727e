"""A vocabulary for FakeRunner's thousand tokens: every byte, then pairs of letters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from workers.grammar.vocabulary import GrammarVocabulary

EOS = 2
_FIRST_BYTE, _FIRST_PAIR = 10, 266


class ByteTokens:
    """Implements workers.grammar.vocabulary.TokenTable."""

    vocab_size = 1000
    added_token_ids = frozenset(range(_FIRST_BYTE))

    def token_bytes(self, token_id: int) -> bytes:
        if _FIRST_BYTE <= token_id < _FIRST_PAIR:
            return bytes((token_id - _FIRST_BYTE,))
        first, second = divmod(token_id - _FIRST_PAIR, 26)
        return bytes((97 + first, 97 + second)) if 0 <= first < 26 else b""

    def encode(self, text: str) -> list[int]:
        return [_FIRST_BYTE + byte for byte in text.encode()]

    def text(self, token_ids: Iterable[int]) -> str:
        return b"".join(b"" if token == EOS else self.token_bytes(token) for token in token_ids).decode()


TOKENS = ByteTokens()


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer as checkpoints have them, for a router that needs some: its tokens are not those above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({"</s>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def vocabulary() -> GrammarVocabulary:
    """Made in 10 ms. It is not kept: what functools.cache makes of a function does not travel whole to an actor."""
    return GrammarVocabulary(TOKENS, TOKENS.vocab_size, (EOS,))
