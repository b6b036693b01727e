"""A step that the device was given: draws its tokens there, and brings them to the host once they exist; knows no layers.

Shapes: T rows of a step, D hidden, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from workers.model.cuda.layer_copies import StepCopies
from workers.model.cuda.step_inputs import LateTokens
from workers.runner import Batch, SampleSpec
from workers.sampling.device import on_device
from workers.sampling.sampler import Drawn, draw, with_logprobs


class LaunchedStep:
    """The handle of CudaRunner.launch. Only `wait` waits for the device.

    The tokens' copy to the host stands directly behind their draw: one that is asked for later would run behind the next
    step. Logprobs are computed when they are waited for; the logits are kept for them.
    """

    def __init__(
        self, batch: Batch, x_TD: Tensor, logits: Callable[[Tensor], Tensor], copies: StepCopies | None = None
    ) -> None:
        self.copies = copies
        """Of blocks that another worker waits for."""
        self.slices = (*batch.prefill, *batch.decode)
        self.rows = list(accumulate((len(piece.token_ids) for piece in self.slices), initial=0))
        self.x_TD = x_TD
        """Prompt logprobs are made of it; a batch with prompts has it in memory of its own."""
        self._forced: dict[int, Drawn] = {}
        self._wanted: list[tuple[int, SampleSpec]] = []
        for i, piece in enumerate(self.slices):
            if piece.sample is not None and piece.sample.forced_token_id is not None:
                self._forced[i] = Drawn(piece.sample.forced_token_id)
            elif piece.sample is not None:
                self._wanted.append((i, piece.sample))
        self._tokens_R, self._logits_RV = torch.zeros(0, dtype=torch.int64, device=x_TD.device), x_TD[:0]
        if self._wanted:
            last_rows = on_device([self.rows[i + 1] - 1 for i, _ in self._wanted], x_TD.device)
            specs = [spec for _, spec in self._wanted]
            logits_RV = logits(x_TD.index_select(0, last_rows))
            self._tokens_R = draw(logits_RV, specs)
            if any(spec.params.logprobs is not None for spec in specs):
                self._logits_RV = logits_RV
        is_cuda = x_TD.is_cuda
        self._host_R = torch.empty(len(self._tokens_R), dtype=torch.int64, pin_memory=is_cuda)
        self._host_R.copy_(self._tokens_R, non_blocking=True)
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(x_TD.device))

    @property
    def late_tokens(self) -> LateTokens:
        """For the step behind this one."""
        row_of = {self.slices[i].sequence_id: row for row, (i, _) in enumerate(self._wanted)}
        return LateTokens(self._tokens_R, row_of)

    def wait(self) -> dict[int, Drawn]:
        """What each slice that asks for a token gets, by its place."""
        if self._copied is not None:
            self._copied.synchronize()
        found = with_logprobs(self._logits_RV, self._host_R.tolist(), [spec for _, spec in self._wanted])
        return self._forced | dict(zip((i for i, _ in self._wanted), found, strict=True))
