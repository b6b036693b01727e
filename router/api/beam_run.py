"""Runs the beam searches of one job by a backend; in place of JobOutputs."""

from __future__ import annotations

from collections.abc import Callable

from router.api.beam_requests import Searches
from router.api.job_outputs import JobOutputs
from router.api.offload import offload
from router.backend import Backend
from router.policies.explain import Decision
from router.wishes import Wishes
from workers.request import FinishReason, HandoffReport, Output
from workers.text.tokenizer import Tokenizer
from workers.token_logprobs import TokenLogprob

_INLINE_BYTES = 64 << 10
"""Of a round's prompts: to put more together takes the event loop for over a millisecond."""


class BeamOutputs:
    """All outputs come at once, when the searches are over. Each round's requests go through the router's queue as any do."""

    is_heartbeat_due = False

    def __init__(
        self, searches: Searches, backend: Backend, tokenizer: Tokenizer, max_len: int, wishes: Wishes
    ) -> None:
        self._searches = searches
        self._backend = backend
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._wishes = wishes
        self._cached_tokens: int | None = None
        """Of the first round: those that follow find what the ones before them computed."""
        self._handoff: HandoffReport | None = None
        self.num_tokens = 0
        self.has_ended = False
        self.is_broken = False

    def decisions(self) -> list[Decision | None]:
        """Every round has its own: none is told."""
        return []

    async def next_batch(self, show: Callable[[int, Output], bool] | None = None) -> list[tuple[int, Output]]:
        """One output of each choice, or the one that says why there is none. When it is cancelled its round begins anew the next time."""
        while asked := await offload(self._searches.ask, self._searches.num_bytes, _INLINE_BYTES):
            scores: list[TokenLogprob | None] = [None] * len(asked)
            generation = await JobOutputs.open(self._backend, asked, None, self._wishes)
            try:
                while not generation.has_ended:
                    for place, output in await generation.next_batch():
                        if output.finish_reason is FinishReason.ERROR:
                            self.has_ended = self.is_broken = True
                            return [(0, output)]
                        if output.logprobs:
                            scores[place] = output.logprobs[0]
                            self._note_first(output)
            finally:
                generation.close()
            self._searches.advance([score for score in scores if score is not None])
        outputs = self._searches.outputs(self._tokenizer, self._max_len)
        self.has_ended = True
        self.num_tokens = sum(len(output.token_ids) for output in outputs)
        return [
            (
                place,
                output._replace(cached_tokens=self._cached_tokens or 0, handoff=self._handoff if not place else None),
            )
            for place, output in enumerate(outputs)
        ]

    def _note_first(self, output: Output) -> None:
        if self._cached_tokens is None:
            self._cached_tokens, self._handoff = output.cached_tokens, output.handoff

    def wrote(self) -> None:
        """Beams are not streamed: nothing waits for a heartbeat."""

    def close(self) -> None:
        """No request outlives the round that it belongs to."""
