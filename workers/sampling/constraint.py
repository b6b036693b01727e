"""What it takes to say which tokens may follow an output so far, and masks of tokens; knows no grammar and no logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from workers.request import ThinkingBudget
from workers.runner import Ids, TokenMask


class Constraint(Protocol):
    """Of one sequence, used by one thread at a time. What it allows is a function of the output tokens alone."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked yet; a grammar takes a while to be prepared."""
        ...

    @property
    def error(self) -> str:
        """Why it can say nothing any more; empty: it can."""
        ...

    def follow(self, output_token_ids: Sequence[int], num_tokens: int) -> None:
        """Takes note of the first so many tokens of an output, which continue those of the call before."""
        ...

    def allowed(self, output_token_ids: Sequence[int]) -> TokenMask | None:
        """The tokens that may follow; at least one. None: all of them. The mask may change with the next call."""
        ...


def empty_mask(vocab_size: int) -> TokenMask:
    return np.zeros(-(-vocab_size // 32), dtype=np.int32)


def mask_of(token_ids: Iterable[int], vocab_size: int) -> TokenMask:
    mask = empty_mask(vocab_size)
    ids = np.fromiter(token_ids, np.int32)
    np.bitwise_or.at(mask.view(np.uint32), ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return mask


def tokens_in(mask: TokenMask) -> Ids:
    """Ascending."""
    bits = np.unpackbits(mask.astype("<i4").view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).astype(np.int32)


def without(mask: TokenMask, banned_ids: Ids) -> TokenMask:
    """The mask without some tokens; the mask itself where that would leave none."""
    if not len(banned_ids):
        return mask
    smaller = mask.copy()
    bits = np.uint32(1) << (banned_ids & 31).astype(np.uint32)
    np.bitwise_and.at(smaller.view(np.uint32), banned_ids >> 5, ~bits)
    return smaller if smaller.any() else mask


class ThinkingEnd:
    """Says when a reasoning that has used its budget up is closed, and with which tokens."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._has_ended = False
        self._num_read = 0

    def forced(self, output_token_ids: Sequence[int]) -> int | None:
        """The token that must follow these, which continue those of the call before; None: any may.

        A reasoning that ends by itself is not touched; one that ends within the closing tokens still gets the rest of them.
        """
        budget, position = self._budget, len(output_token_ids)
        first = 0 if budget.start_token_id is None else 1
        if first and (not output_token_ids or output_token_ids[0] != budget.start_token_id):
            return None
        until = min(position, first + budget.num_tokens)
        if self._num_read < until:
            self._has_ended = self._has_ended or budget.end_token_id in output_token_ids[self._num_read : until]
            self._num_read = until
        place = position - first - budget.num_tokens
        return budget.closing[place] if 0 <= place < len(budget.closing) and not self._has_ended else None
