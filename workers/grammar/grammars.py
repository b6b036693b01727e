"""Prepares the grammars of an engine's sequences on a thread of its own, and keeps the last ones; knows no scheduler.

A sequence waits for its grammar while others run. What waits is bounded by the engine's sequences.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.errors import InvalidRequest
from workers.grammar.language import MISSING, limits, said
from workers.grammar.sequence_constraint import SequenceConstraint
from workers.grammar.vocabulary import GrammarVocabulary
from workers.machine.threads import started_threads
from workers.request import SamplingParams

if TYPE_CHECKING:
    import llguidance

log = logging.getLogger(__name__)

MAX_KEPT = 32
"""Grammars that are not read again when another request has the same; up to a few MiB each."""
MAX_COMPILE_S = 10.0
TOO_SLOW = f"the grammar was not read within {MAX_COMPILE_S:g} s: make it smaller"


@dataclass(frozen=True, slots=True)
class _Unread:
    constraint: SequenceConstraint
    since_s: float


class Grammars:
    """Used by the thread of an engine; only `begin`'s work happens elsewhere. Without a vocabulary no grammar is taken."""

    def __init__(
        self,
        vocabulary: GrammarVocabulary | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        clock: Callable[[], float],
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._clock = clock
        self.waiting: dict[int, _Unread] = {}
        """By sequence; where there are none, `poll` finds nothing."""
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        """Used by the pool's one thread alone."""
        # Its thread runs from now on: one that cannot be started later, under a full process table, would end the engine's.
        self._pool = started_threads(1, "grammars") if vocabulary is not None else None
        self._news = threading.Event()
        self._notify: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raises InvalidRequest when no request with a grammar can ever run here."""
        if self._vocabulary is None:
            raise InvalidRequest(MISSING, "grammar")

    def begin(
        self, sequence_id: int, params: SamplingParams, output_token_ids: Sequence[int] = ()
    ) -> SequenceConstraint:
        """The constraint of a sequence whose output begins with these tokens; it may not be ready yet."""
        constraint = SequenceConstraint(params, self._vocab_size, self._eos)
        if params.grammar:
            self.waiting[sequence_id] = _Unread(constraint, self._clock())
            if self._pool is None:
                constraint.fail(MISSING)
            else:
                self._pool.submit(self._prepare, constraint, params.grammar, tuple(output_token_ids))
        return constraint

    def poll(self, now: float) -> list[tuple[int, str]]:
        """Sequences whose grammar cannot be used, each with the reason; each is told once."""
        self._news.clear()
        failed = []
        for sequence_id, waiting in list(self.waiting.items()):
            if not waiting.constraint.is_ready and now - waiting.since_s > MAX_COMPILE_S:
                waiting.constraint.fail(TOO_SLOW)
            if waiting.constraint.is_ready:
                del self.waiting[sequence_id]
                if waiting.constraint.error:
                    failed.append((sequence_id, waiting.constraint.error))
        return failed

    def on_ready(self, notify: Callable[[], None]) -> None:
        """`notify` is called, on another thread, when a grammar is ready."""
        self._notify = notify

    def wait(self, timeout_s: float) -> bool:
        """Returns when `poll` may find something new, or after so long; False at once when no grammar is being prepared."""
        if not self.waiting:
            return False
        self._news.wait(timeout_s)
        return True

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, constraint: SequenceConstraint, grammar: str, output_token_ids: tuple[int, ...]) -> None:
        try:
            constraint.begin(self._matcher(grammar), output_token_ids)
        except ValueError as error:
            constraint.fail(str(error))
        except Exception as error:
            log.error("a grammar of %d characters broke its reader", len(grammar), exc_info=error)
            constraint.fail("the grammar cannot be read")
        self._news.set()
        self._notify()

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Raises ValueError for a grammar that is none."""
        import llguidance

        kept = self._kept.get(grammar)
        if kept is None:
            assert self._vocabulary is not None
            kept = llguidance.LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0, limits=limits())
            if kept.is_error():
                raise ValueError(said(kept.get_error()))
            self._kept[grammar] = kept
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return kept.deep_copy()
