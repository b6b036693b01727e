"""Tells the outputs of one choice token by token, in whatever pieces they come. Knows no HTTP.

How many tokens come in one output is a matter of the moment. An answer that is to be written twice, byte for byte, is written from
single tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from workers.request import Output, Request
from workers.text.output import OutputState
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer

BITE = 64
"""Tokens that are told at once: some 2 ms of work, with what is written of them."""


class Retelling:
    """Outputs must come in their order, from the first token on."""

    def __init__(self, request: Request, tokenizer: Tokenizer, max_len: int, has_text: bool) -> None:
        """`has_text` False: texts are made here from the tokens alone."""
        self._request = request
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._has_text = has_text
        self._token_ids: list[int] = []
        self._text: OutputState | None = None
        """Has been told all of `_token_ids`; None: it was not needed yet."""

    async def pieces(self, output: Output) -> AsyncIterator[Output]:
        """Others have a turn between a few of them: what is taken up may be long."""
        ids, start = output.token_ids, output.position
        if self._has_text and len(ids) <= 1:
            self._token_ids += ids
            if self._text is not None:
                for token_id in ids:
                    self._text.push(token_id)
            yield output
            return
        if self._text is None:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer, self._request.prompt_token_ids[-4:], self._request.params.skip_special_tokens
            )
            self._text = OutputState(self._request, detokenizer, self._tokenizer.eos_token_ids, self._max_len)
            for place in range(0, len(self._token_ids), BITE):
                self._push(self._token_ids[place : place + BITE])
                await asyncio.sleep(0)
        for place in range(max(1, len(ids))):
            if place and place % BITE == 0:
                await asyncio.sleep(0)
            own = slice(place, place + 1)
            piece = output._replace(
                position=start + place,
                token_ids=ids[own],
                text=self._push(ids[own]),
                logprobs=output.logprobs[own],
            )
            if place:
                piece = piece._replace(cached_tokens=0, prompt_logprobs=(), handoff=None)
            if place < len(ids) - 1:
                piece = piece._replace(finish_reason=None, stop_reason=None, refusal=None, message="")
            yield piece
        self._token_ids += ids

    def _push(self, token_ids: Sequence[int]) -> str:
        assert self._text is not None
        return "".join([self._text.push(token_id).text for token_id in token_ids])
