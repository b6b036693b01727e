"""Writes log-probabilities in the forms of the chat, the completions and the prompt_logprobs fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from router.api.progress import Choice
from workers.request import LOGPROB_FLOOR, TokenLogprob
from workers.tokenizer import IncrementalDetokenizer, Tokenizer


class LogprobWriter:
    """`tokens_as_ids` writes `token_id:123` in place of a token's text, so that no two tokens look alike."""

    def __init__(self, tokenizer: Tokenizer, tokens_as_ids: bool, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._tokens_as_ids = tokens_as_ids
        self._num_top = num_top

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokens_as_ids else self._tokenizer.token_text(token_id)

    def chat(self, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
        """`{"content": [...]}`: the drawn tokens, each with the top_logprobs asked for."""
        return {
            "content": [
                {
                    **self._chat_entry(entry.token_id, entry.logprob),
                    "top_logprobs": [self._chat_entry(*pair) for pair in entry.top[: self._num_top]],
                }
                for entry in entries
            ]
        }

    def _chat_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self.text(token_id), "logprob": _floored(logprob), "bytes": list(raw)}

    def top(self, entry: TokenLogprob) -> dict[str, float]:
        """The completions form of one token's alternatives: always with the token itself."""
        best: dict[str, float] = {}
        for token_id, logprob in entry.top[: self._num_top]:
            best.setdefault(self.text(token_id), _floored(logprob))
        best.setdefault(self.text(entry.token_id), _floored(entry.logprob))
        return best


class CompletionLogprobs:
    """The completions form of one choice, piece by piece; text_offset counts on from the start of the choice's text."""

    def __init__(self, writer: LogprobWriter, tokenizer: Tokenizer, choice: Choice, echo: bool) -> None:
        self._writer = writer
        self._choice = choice
        self._offset = 0
        prompt_ids = choice.request.prompt_token_ids
        self._prompt_ids = prompt_ids if echo else ()
        self._prompt_detokenizer = IncrementalDetokenizer(tokenizer, (), skip_special_tokens=False)
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_ids[-4:], skip_special_tokens=choice.request.params.skip_special_tokens
        )

    def piece(self, entries: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """tokens, token_logprobs, top_logprobs, text_offset; the first piece of an echo begins with the prompt."""
        pairs: list[tuple[int, TokenLogprob | None, IncrementalDetokenizer]] = []
        if self._prompt_ids:
            scores = self._choice.prompt_logprobs or (None,) * len(self._prompt_ids)
            pairs = [(*pair, self._prompt_detokenizer) for pair in zip(self._prompt_ids, scores, strict=True)]
            self._prompt_ids = ()
        pairs += [(entry.token_id, entry, self._detokenizer) for entry in entries]
        written: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry, detokenizer in pairs:
            written["tokens"].append(self._writer.text(token_id))
            written["token_logprobs"].append(None if entry is None else _floored(entry.logprob))
            written["top_logprobs"].append(None if entry is None else self._writer.top(entry))
            written["text_offset"].append(self._offset)
            self._offset += len(detokenizer.push(token_id))
        return written


def write_prompt_logprobs(
    tokenizer: Tokenizer, scores: Sequence[TokenLogprob | None] | None, num_top: int
) -> list[dict[str, Any] | None] | None:
    """One entry per prompt token, null for the first: token id -> logprob, rank (1: the likeliest), text."""
    return None if scores is None else [_ranked(tokenizer, score, num_top) for score in scores]


def _ranked(tokenizer: Tokenizer, score: TokenLogprob | None, num_top: int) -> dict[str, Any] | None:
    if score is None:
        return None
    ranks: dict[int, int | None] = {score.token_id: score.rank}
    ranks |= {token_id: place + 1 for place, (token_id, _) in enumerate(score.top)}
    return {
        str(token_id): {
            "logprob": _floored(logprob),
            "rank": ranks[token_id],
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob in (*score.top[:num_top], (score.token_id, score.logprob))
    }


def _floored(logprob: float) -> float:
    """JSON has no -inf; NaN becomes the floor too."""
    return logprob if logprob > LOGPROB_FLOOR else LOGPROB_FLOOR
