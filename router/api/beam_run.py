"""Runs the beam searches of one job by a backend; in place of JobOutputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from router.api.beam_requests import Searches
from router.api.job_outputs import JobOutputs
from router.api.offload import offload
from router.backend import Backend
from router.policies.explain import Decision
from router.wishes import Wishes
from workers.errors import InvariantViolated, Refusal, Refused
from workers.request import FinishReason, Output, Request
from workers.text.tokenizer import Tokenizer
from workers.token_logprobs import TokenLogprob

_INLINE_BYTES = 64 << 10
"""Of a round's prompts: to put more together takes the event loop for over a millisecond."""
_INLINE_SCORES = 512
"""To choose among more alternatives takes as long."""
_INLINE_TOKENS = 256
"""To write the text of more takes as long."""
_RETRY_S = 1.0


class BeamOutputs:
    """All outputs come at once, when the searches are over. Each round's requests go through the router's queue as any do.

    All rounds together have as long as one request has, from now on. Once a round has run, what it has computed is not thrown away
    for a full queue: the next one waits.
    """

    is_heartbeat_due = False

    def __init__(
        self, searches: Searches, backend: Backend, tokenizer: Tokenizer, max_len: int, wishes: Wishes
    ) -> None:
        self._searches = searches
        self._backend = backend
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._wishes = wishes
        longest_s = backend.request_timeout_s
        self._ends_s = time.monotonic() + min(longest_s, wishes.timeout_s or longest_s)
        self._firsts: dict[int, Output] = {}
        """Of each prompt, in the first round: those that follow find what the ones before them computed."""

    def decisions(self) -> list[Decision | None]:
        """Every round has its own: none is told."""
        return []

    async def next_batch(self, show: Callable[[int, Output], bool] | None = None) -> list[tuple[int, Output]]:
        """One output of each choice, or the one that says why there is none. Raises Refused."""
        searches = self._searches
        while asked := await offload(searches.ask, searches.num_bytes, _INLINE_BYTES):
            scores: list[TokenLogprob | None] = [None] * len(asked)
            generation = await self._open(asked)
            try:
                while not generation.has_ended:
                    for place, output in await generation.next_batch():
                        if output.finish_reason is FinishReason.ERROR:
                            is_late = output.refusal is Refusal.DEADLINE_EXCEEDED
                            return [(0, output._replace(message=self._too_long()) if is_late else output)]
                        if output.logprobs:
                            scores[place] = output.logprobs[0]
                            if not searches.num_rounds:  # it asks for one token of each prompt
                                self._firsts[place] = output
            finally:
                generation.close()
            told = [score for score in scores if score is not None]
            if len(told) < len(asked):
                raise InvariantViolated(
                    "a worker has ended a request of a beam search without the logprobs of its token"
                )
            await offload(partial(searches.advance, told), searches.num_scores, _INLINE_SCORES)
        outputs = await offload(
            lambda: searches.outputs(self._tokenizer, self._max_len), searches.num_tokens, _INLINE_TOKENS
        )
        return [(place, self._with_first(place, output)) for place, output in enumerate(outputs)]

    async def _open(self, asked: tuple[Request, ...]) -> JobOutputs:
        """Submits a round. Raises Refused."""
        num_rounds = self._searches.num_rounds
        while True:
            left_s = self._ends_s - time.monotonic()
            if left_s <= 0:
                raise Refused(Refusal.DEADLINE_EXCEEDED, self._too_long())
            wishes = replace(self._wishes, timeout_s=left_s, round=num_rounds + 1)
            if num_rounds:
                wishes = replace(wishes, ttft_s=0.0)
            try:
                return await JobOutputs.open(self._backend, asked, None, wishes)
            except Refused as error:
                if not num_rounds or error.refusal is not Refusal.QUEUE_FULL:
                    raise
                await asyncio.sleep(min(left_s, error.retry_after_s or _RETRY_S))

    def _too_long(self) -> str:
        timeout_s = self._wishes.timeout_s
        said = f"timeout = {timeout_s:g} s" if timeout_s else "the time that the router allows"
        return f"the beam search was not done within {said}"

    def _with_first(self, place: int, output: Output) -> Output:
        prompt, choice = divmod(place, self._searches.width)
        first = self._firsts[prompt]
        return output._replace(cached_tokens=first.cached_tokens, handoff=None if choice else first.handoff)

    def wrote(self) -> None:
        """Beams are not streamed: nothing waits for a heartbeat."""

    def close(self) -> None:
        """No request outlives the round that it belongs to."""
