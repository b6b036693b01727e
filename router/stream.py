"""The outputs of one request on their way to a client that may be slower than its worker. Bounded; knows no core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.errors import Refusal
from workers.request import FinishReason, Output


class RequestStream:
    """An OutputStream. Outputs that wait for the reader become one, so what is kept grows with tokens."""

    def __init__(self, request_id: str, max_tokens: int, on_close: Callable[[str], None]) -> None:
        """`max_tokens` may wait; `on_close` is called when the reader leaves before the end."""
        self.request_id = request_id
        self._max_tokens = max_tokens
        self._on_close = on_close
        self._waiting: list[Output] = []
        self._num_tokens = 0
        """That wait."""
        self._wake: Callable[[], None] | None = None
        self._is_ended = False
        """The last output has been taken, or the reader has left."""

    def push(self, output: Output) -> bool:
        """Adds the next output. False: too many tokens wait, it was not added."""
        num_tokens = self._num_tokens + len(output.token_ids)
        if self._waiting and num_tokens > self._max_tokens:
            return False
        self._num_tokens = num_tokens
        self._add(output)
        return True

    def fail(self, refusal: Refusal, message: str) -> None:
        """Adds an error as the last output; what waits stays."""
        position = self._waiting[0].position + self._num_tokens if self._waiting else 0
        self._add(Output(self.request_id, position, finish_reason=FinishReason.ERROR, refusal=refusal, message=message))

    def take(self, wake: Callable[[], None]) -> Output | None:
        waiting = self._waiting
        self._wake = wake
        if not waiting:
            return None
        self._waiting, self._num_tokens = [], 0
        output = waiting[0] if len(waiting) == 1 else merged(waiting)
        self._is_ended = self._is_ended or output.finish_reason is not None
        return output

    def close(self) -> None:
        """Cancels the request, unless it has ended."""
        if not self._is_ended:
            self._is_ended = True
            self._on_close(self.request_id)

    def _add(self, output: Output) -> None:
        self._waiting.append(output)
        wake, self._wake = self._wake, None
        if wake is not None:
            wake()


def merged(outputs: Sequence[Output]) -> Output:
    """One output that says what several in a row say; each is copied once."""
    first, last = outputs[0], outputs[-1]
    return Output(
        request_id=first.request_id,
        position=first.position,
        token_ids=tuple([token_id for output in outputs for token_id in output.token_ids]),
        text="".join([output.text for output in outputs]),
        logprobs=tuple([entry for output in outputs for entry in output.logprobs]),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        refusal=last.refusal,
        message=last.message,
        cached_tokens=next((output.cached_tokens for output in outputs if output.cached_tokens), 0),
        prompt_logprobs=tuple([part for output in outputs for part in output.prompt_logprobs]),
        handoff=next((output.handoff for output in outputs if output.handoff is not None), None),
    )
