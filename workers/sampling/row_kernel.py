"""What faster kernels do for logits on the host: all that workers.sampling.sampler defines, with the same results.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from workers.prompt_scores import PromptScores
from workers.request import TokenLogprob
from workers.runner import SampleSpec


class RowKernel(Protocol):
    """Rows are fp32 on the host. None stands for a row, or for rows among which is one, with a logit that is +inf or no number:
    PyTorch decides there."""

    def sample(self, logits_RV: Tensor, specs: Sequence[SampleSpec]) -> list[tuple[int, TokenLogprob | None] | None]:
        """The token of each row, and its logprobs where the spec asks for them. No spec has a forced token."""

    def score_tokens(self, logits_RV: Tensor, tokens: Sequence[int], num_top: int, first: int) -> PromptScores | None:
        """As workers.sampling.logprobs.score_tokens."""
