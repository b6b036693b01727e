"""The outputs of one request on their way to a client that may be slower than its worker. Bounded; knows no core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from workers.errors import Refusal
from workers.request import FinishReason, Output


class RequestStream:
    """An OutputStream. Outputs that wait for the reader are merged, so memory grows with tokens, not with steps."""

    def __init__(self, request_id: str, max_tokens: int, on_close: Callable[[str], None]) -> None:
        """`max_tokens` may wait; `on_close` is called when the reader leaves before the end."""
        self.request_id = request_id
        self._max_tokens = max_tokens
        self._on_close = on_close
        self._waiting: Output | None = None
        self._has_output = asyncio.Event()
        self._is_ended = False

    def push(self, output: Output) -> bool:
        """Adds the next output. False: too many tokens wait, it was not added."""
        waiting = self._waiting
        if waiting is None:
            self._waiting = output
            self._has_output.set()
            return True
        if len(waiting.token_ids) + len(output.token_ids) > self._max_tokens:
            return False
        self._waiting = merge(waiting, output)
        return True

    def fail(self, refusal: Refusal, message: str) -> None:
        """Adds an error as the last output; what waits stays."""
        waiting = self._waiting
        position = 0 if waiting is None else waiting.position + len(waiting.token_ids)
        error = Output(self.request_id, position, finish_reason=FinishReason.ERROR, refusal=refusal, message=message)
        self._waiting = error if waiting is None else merge(waiting, error)
        self._has_output.set()

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        if self._is_ended:
            raise StopAsyncIteration
        if self._waiting is None:
            await self._has_output.wait()
        output = self._waiting
        if output is None:
            raise StopAsyncIteration
        self._waiting = None
        self._has_output.clear()
        self._is_ended |= (
            output.finish_reason is not None
        )  # the reader may have closed while this output was on its way
        return output

    async def aclose(self) -> None:
        """Cancels the request, unless it has ended."""
        if not self._is_ended:
            self._is_ended = True
            self._on_close(self.request_id)
            self._has_output.set()


def merge(first: Output, second: Output) -> Output:
    """One output that says what two in a row say."""
    return Output(
        request_id=first.request_id,
        position=first.position,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        refusal=second.refusal,
        message=second.message,
        cached_tokens=first.cached_tokens or second.cached_tokens,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        handoff=first.handoff or second.handoff,
    )
