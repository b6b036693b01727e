"""The contract of runners that compute while the host goes on: `launch` starts a step, `finish` waits for what it drew.

Knows no tensors and no scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from workers.runner import Batch, FakeRunner, LayerHook, Runner, Sampled, SequenceSlice


@runtime_checkable
class LaunchingRunner(Runner, Protocol):
    """A Runner whose steps run in the order of their launches. `execute(batch, hook)` is `finish(launch(batch, None, hook))`.

    A slice that `is_late` takes the token that the step `after` draws for its sequence: a step that was launched
    directly before this one and need not be finished yet. Steps are finished in the order of their launches, each once;
    one whose launch raised counts as never launched. What a handle is, the runner alone knows. `on_layer` is called, on
    whichever thread, before `finish` returns or raises, and not after a launch that has raised.
    """

    def launch(self, batch: Batch, after: Any = None, on_layer: LayerHook | None = None) -> Any: ...

    def finish(self, launched: Any) -> list[Sampled]: ...


@dataclass(slots=True, eq=False)
class Postponed:
    """A step that LateFakeRunner has put off; `results` once it has run."""

    batch: Batch
    after: Postponed | None
    on_layer: LayerHook | None = None
    results: list[Sampled] = field(default_factory=list)


class LateFakeRunner(FakeRunner):
    """A FakeRunner as slow as a device can be: a launched step reads and writes no block before it is finished.

    Whoever gives the blocks of a running step to somebody else, or looks at its tokens too early, gets other tokens.
    """

    def launch(self, batch: Batch, after: Postponed | None = None, on_layer: LayerHook | None = None) -> Postponed:
        prefill, decode = (tuple(_as_it_is_now(piece) for piece in part) for part in (batch.prefill, batch.decode))
        return Postponed(Batch(prefill, decode), after, on_layer)

    def finish(self, launched: Postponed) -> list[Sampled]:
        before = launched.after.results if launched.after else []  # none where that step failed: any token will do then
        drawn = {sampled.sequence_id: sampled.token_id for sampled in before}
        launched.after = None  # or every step would keep all steps before it
        decode: list[SequenceSlice] = []
        for piece in launched.batch.decode:
            if piece.is_late:
                token = drawn[piece.sequence_id] if before else None
                piece = replace(piece, token_ids=(token or 0,))
            decode.append(piece)
        launched.results = super().execute(Batch(launched.batch.prefill, tuple(decode)), launched.on_layer)
        return launched.results

    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        return self.finish(self.launch(batch, None, on_layer))


def _as_it_is_now(piece: SequenceSlice) -> SequenceSlice:
    """The slice as a device sees it: what is drawn, or grown, after the launch does not get there."""
    spec = piece.sample and replace(piece.sample, output_token_ids=tuple(piece.sample.output_token_ids))
    return replace(piece, sample=spec, block_table=tuple(piece.block_table))
