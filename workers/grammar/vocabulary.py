"""A model's vocabulary as grammars see it: the bytes of each token, and which tokens are no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from workers.grammar.language import limits, said
from workers.sampling.constraint import empty_mask


class TokenTable(Protocol):
    """What is asked of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def added_token_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str) -> list[int]: ...


class GrammarVocabulary:
    """Immutable. Takes about 10 us a token to make."""

    def __init__(self, tokenizer: TokenTable, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Added tokens, `eos_token_ids` among them, are no text: a grammar names them or they cannot come."""
        import llguidance

        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        source = _Source(tokenizer, self.eos_token_ids)
        self.tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(source), n_vocab=vocab_size, eos_token=list(self.eos_token_ids)
        )

    def problem_of(self, grammar: str) -> str:
        """What is wrong with a grammar, in a sentence; empty: nothing. Takes milliseconds; lets other threads run meanwhile."""
        import llguidance

        matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits())
        if not matcher.is_error():
            first = empty_mask(self.vocab_size)  # some limits show only where the first token is looked for
            matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        return said(matcher.get_error())


class _Source:
    """What llguidance.TokenizerWrapper asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: TokenTable, eos_token_ids: Sequence[int]) -> None:
        self.eos_token_id = eos_token_ids[0]
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.added_token_ids.union(eos_token_ids))
        self._encode: Callable[[str], list[int]] = tokenizer.encode
        self._by_bytes: dict[bytes, int] = {}
        no_text = frozenset(self.special_token_ids)
        for token_id, raw in enumerate(self.tokens):
            if raw and token_id not in no_text:
                self._by_bytes.setdefault(raw, token_id)
        self._longest = max(map(len, self._by_bytes), default=1)

    def __call__(self, text: str) -> list[int]:
        """How forced text is written. Vocabularies that put a blank before every text write another one: then the longest token
        that fits comes next."""
        if not isinstance(text, str):
            raise TypeError("texts are strings")
        ids = self._encode(text)
        raw = text.encode()
        return ids if b"".join([self.tokens[token_id] for token_id in ids]) == raw else self._longest_first(raw)

    def _longest_first(self, raw: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(raw):
            for length in range(min(self._longest, len(raw) - start), 0, -1):
                token_id = self._by_bytes.get(raw[start : start + length])
                if token_id is not None:
                    ids.append(token_id)
                    start += length
                    break
            else:
                start += 1  # no token has this byte, and so no text will
        return ids
