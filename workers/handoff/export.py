"""What the sending end of a handoff needs of whatever is handed over: the contract, and prompts that are computed for another worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from workers.engine_thread import Add, CancelSequence, Command
from workers.errors import Refusal, Refused
from workers.kv_transfer.messages import Done, OpenHandoff, PrefillDone, Prompt
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.source import Broken, Filled
from workers.runner import BLOCK_SIZE
from workers.scheduler.sequence import Kind
from workers.stepping.result import BlocksFilled, LayersFilled, Prefilled
from workers.tracing import NO_SPAN, Span, start_span

Feed = Callable[[Filled | Done | Broken], None]
"""Takes what an export has to say, on the event loop: blocks that filled (never to change again until `release`), then Done;
or Broken at any moment."""


class Export(Protocol):
    """One subject under way to one receiver."""

    def start(self) -> None:
        """Called once, when the transfer is accepted: begin to feed."""

    def release(self, reason: str) -> None:
        """Called exactly once, whatever happened: nobody reads the blocks for this transfer any more. `reason` is empty when
        the receiver has everything, else it says why it has not."""


@runtime_checkable
class Paced(Protocol):
    """An export that goes by how far its receiver has come."""

    def acknowledged(self, num_pieces: int) -> None:
        """Called when a transport is chosen and after each event: so many pieces are in place and verified there."""


class Exporter(Protocol):
    """Opens exports of one kind of subject."""

    def open(self, opening: OpenHandoff, cut: Cut, feed: Feed) -> Export:
        """Checks what can be checked at once; reserves nothing yet. Raises Refused."""
        ...


class PromptExporter:
    """Prompts to compute, as sequences of kind SOURCE; the engine's reports come in through filled, prefilled and failed."""

    def __init__(self, post: Callable[[Command], None], new_sequence_id: Callable[[], int]) -> None:
        self._post = post
        self._new_sequence_id = new_sequence_id
        self._running: dict[int, _PromptExport] = {}

    def open(self, opening: OpenHandoff, cut: Cut, feed: Feed) -> Export:
        """As Exporter.open."""
        assert isinstance(opening.subject, Prompt)
        num_blocks = -(-len(opening.subject.request.prompt_token_ids) // BLOCK_SIZE)
        if not 0 <= opening.first_block < max(num_blocks, 1):
            raise Refused(Refusal.INVALID, "first_block is outside the prompt")
        if opening.first_block + opening.num_blocks != num_blocks:
            raise Refused(Refusal.INVALID, f"the receiver reserved other than {num_blocks} blocks for the prompt")
        return _PromptExport(self, self._new_sequence_id(), opening.subject, cut, feed)

    def filled(self, event: BlocksFilled) -> None:
        export = self._running.get(event.sequence_id)
        if export is not None:
            # Those before have been told of; a prompt of many chunks would else walk all of them with each.
            first, export.num_filled = export.num_filled, max(export.num_filled, event.num_filled)
            export.feed(Filled(event.blocks, first, event.num_filled, export.cut.layout.num_layers))

    def layers_filled(self, event: LayersFilled) -> None:
        export = self._running.get(event.sequence_id)
        if export is not None:
            export.feed(Filled(event.blocks, event.first, event.end, event.num_layers))

    def prefilled(self, event: Prefilled) -> None:
        export = self._running.get(event.sequence_id)
        if export is not None:
            sampled = event.sampled
            assert sampled.token_id is not None
            num_pieces = export.cut.num_pieces
            export.span.set(cached_tokens=event.cached_tokens, prefill_s=event.prefill_s)
            export.span.end()
            export.feed(
                PrefillDone(sampled.token_id, sampled.logprob, num_pieces, event.cached_tokens, event.prefill_s)
            )

    def failed(self, sequence_id: int, message: str) -> bool:
        """The engine refused or failed a sequence; True when it was one of ours."""
        export = self._running.get(sequence_id)
        if export is not None:
            export.feed(Broken(message, is_ours=True))
        return export is not None

    def _start(self, export: _PromptExport) -> None:
        self._running[export.sequence_id] = export
        export.span = start_span("prefill", export.subject.request.traceparent)
        self._post(Add(export.sequence_id, export.subject.request, Kind.SOURCE, export.subject.hint))

    def _release(self, export: _PromptExport, reason: str) -> None:
        export.span.end(reason)
        if self._running.pop(export.sequence_id, None) is not None:
            self._post(CancelSequence(export.sequence_id))


class _PromptExport:
    def __init__(self, owner: PromptExporter, sequence_id: int, subject: Prompt, cut: Cut, feed: Feed) -> None:
        self._owner = owner
        self.sequence_id = sequence_id
        self.subject = subject
        self.cut = cut
        self.feed = feed
        self.num_filled = 0
        """Entries of the block table that are known to be complete."""
        self.span: Span = NO_SPAN

    def start(self) -> None:
        self._owner._start(self)

    def release(self, reason: str) -> None:
        self._owner._release(self, reason)
