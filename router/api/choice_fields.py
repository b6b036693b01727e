"""Writes log-probabilities in the forms of the chat, the completions and the prompt_logprobs fields."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from router.api.job_progress import Choice
from router.api.sse import Lazy, json_parts, lazy_list, to_json
from router.api.translate import Job
from workers.limits import ALTERNATIVES
from workers.request import Output
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer
from workers.token_logprobs import LOGPROB_FLOOR, PromptScores, TokenLogprob


def end_of_piece(job: Job, output: Output, reason: str | None = None) -> str:
    """JSON of a streamed piece from the value of "finish_reason" on, without the closing brace. `reason`: the one to be told."""
    end = "null"
    if output.finish_reason is not None:
        end = f'"{reason or output.finish_reason.value}","stop_reason":{to_json(output.stop_reason)}'
    if job.return_token_ids:
        end += f',"token_ids":{to_json(output.token_ids)}'
    return end


def end_of_choice(job: Job, choice: Choice) -> dict[str, Any]:
    """The same of a whole answer."""
    fields: dict[str, Any] = {
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": None,
    }
    if job.return_token_ids:
        fields["token_ids"] = [token_id for output in choice.outputs for token_id in output.token_ids]
    return fields


def more_fields(fields: dict[str, Any]) -> Iterator[str]:
    """JSON of fields that follow others, in parts."""
    for name, value in fields.items():
        yield f",{to_json(name)}:"
        yield from json_parts(value)


def about_prompt(job: Job, tokenizer: Tokenizer, choice: Choice) -> dict[str, Any]:
    """Token ids and logprobs of a choice's prompt, where they were asked for."""
    fields: dict[str, Any] = {}
    if job.return_token_ids:
        fields["prompt_token_ids"] = choice.prompt.token_ids
    if job.prompt_logprobs is not None:
        fields["prompt_logprobs"] = write_prompt_logprobs(tokenizer, choice, job.prompt_logprobs)
    return fields


OF_NO_PROMPT: dict[str, Any] = {"prompt_token_ids": None, "prompt_logprobs": None}
"""In a whole answer where they were not asked for: clients read them as attributes."""
OF_NO_SERVICE: dict[str, Any] = {"service_tier": None, "system_fingerprint": None}
"""So these of OpenAI's."""


class LogprobWriter:
    """`tokens_as_ids` writes `token_id:123` in place of a token's text, so that no two tokens look alike."""

    def __init__(self, tokenizer: Tokenizer, tokens_as_ids: bool, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._tokens_as_ids = tokens_as_ids
        self._num_top = num_top

    @property
    def size(self) -> int:
        """Of an entry, as lazy_list takes it; one with 20 alternatives counts as 1."""
        return 1 + self._num_top // ALTERNATIVES

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokens_as_ids else self._tokenizer.token_text(token_id)

    def content(self, entries: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
        """What the chat form has in `content`: the drawn tokens, each with the top_logprobs asked for."""
        return [
            {
                **self._chat_entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._chat_entry(*pair) for pair in entry.top[: self._num_top]],
            }
            for entry in entries
        ]

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
        self._tokenizer = tokenizer
        self._choice = choice
        self._offset = 0
        prompt_ids = choice.request.prompt_token_ids
        self._prompt_ids = prompt_ids if echo else ()
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_ids[-4:], skip_special_tokens=choice.request.params.skip_special_tokens
        )

    def piece(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """tokens, token_logprobs, top_logprobs, text_offset; the first piece of an echo begins with the prompt, and is Lazy."""
        num_prompt, offsets = len(self._prompt_ids), []
        if num_prompt:
            detokenizer = IncrementalDetokenizer(self._tokenizer, (), skip_special_tokens=False)
            offsets += self._count(self._prompt_ids, detokenizer)
        offsets += self._count([entry.token_id for entry in entries], self._detokenizer)
        prompt_ids, self._prompt_ids = self._prompt_ids, ()
        if not num_prompt:
            return self._columns(entries, [entry.token_id for entry in entries]) | {"text_offset": offsets}
        scores = PromptEntries(self._choice.prompt_logprobs)

        def column(name: str) -> Callable[[range], Sequence[Any]]:
            def read(places: range) -> Sequence[Any]:
                ends = range(max(places.start, num_prompt), places.stop)
                prompt = [scores[place] for place in places if place < num_prompt]
                said = [entries[place - num_prompt] for place in ends]
                ids = [*prompt_ids[places.start : places.stop], *(entry.token_id for entry in said)]
                column: Sequence[Any] = self._columns([*prompt, *said], ids)[name]
                return column

            return read

        names, num_entries = ("tokens", "token_logprobs", "top_logprobs"), num_prompt + len(entries)
        size = self._writer.size
        columns: dict[str, Any] = {name: lazy_list(num_entries, column(name), size) for name in names}
        return columns | {"text_offset": offsets}

    def _columns(self, entries: Sequence[TokenLogprob | None], token_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._writer.text(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else _floored(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._writer.top(entry) for entry in entries],
        }

    def _count(self, token_ids: Iterable[int], detokenizer: IncrementalDetokenizer) -> list[int]:
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(detokenizer.push(token_id))
        return offsets


class PromptEntries:
    """The scores of a prompt by the numbers of its tokens; None for the first, and for those that nobody scored."""

    def __init__(self, parts: Sequence[PromptScores]) -> None:
        self._parts = parts
        self._ends = [part.end for part in parts]

    def __getitem__(self, place: int) -> TokenLogprob | None:
        index = bisect_right(self._ends, place)
        if index == len(self._parts) or place < self._parts[index].first:
            return None
        return self._parts[index][place - self._parts[index].first]


def write_prompt_logprobs(tokenizer: Tokenizer, choice: Choice, num_top: int) -> Lazy:
    """One entry per prompt token, null for the first: token id -> logprob, rank (1: the likeliest), text."""
    scores = PromptEntries(choice.prompt_logprobs)
    return lazy_list(
        len(choice.prompt.token_ids),
        lambda places: [_ranked(tokenizer, scores[place], num_top) for place in places],
        1 + num_top // ALTERNATIVES,
    )


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
