"""What one request would take on each worker, in seconds, from the columns of the table and what was learnt of times. Chooses nothing.

All are vector operations over the workers, done when they are first asked for and kept while one request is routed.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from router.fleet.worker_table import Numbers, Seconds
from router.policies.policy import Candidates, Demand

UNKNOWN_BATCH = 512
"""Tokens of a step where a worker has not said."""
LEAST_BUDGET = 64
"""Tokens of a step that are left for prompts, however many sequences decode."""


class Outlook:
    """[N] arrays, a row a worker. What a worker's steps take is known from its kind until it has computed some itself."""

    def __init__(self, demand: Demand, candidates: Candidates) -> None:
        self.demand = demand
        self.candidates = candidates
        self.table = candidates.table

    # ---- the prompt ----

    @cached_property
    def uncached(self) -> Numbers:
        """Tokens of the prompt that a worker would compute; the last one at least."""
        demand = self.demand
        uncached: Numbers = np.maximum(
            1, demand.num_prompt_tokens - self.candidates.prefixes.cached * demand.block_size
        )
        return uncached

    @cached_property
    def num_decoding(self) -> Seconds:
        """Sequences that get a token with each step there, now."""
        decoding: Seconds = np.minimum(self.table.steps[:, 1], self.table.num_sequences)
        return decoding

    @cached_property
    def context(self) -> Seconds:
        """Tokens of a sequence that decodes there, on average, in the last step."""
        context: Seconds = self.table.steps[:, 2] / np.maximum(1.0, self.table.steps[:, 1])
        return context

    @cached_property
    def chunk(self) -> Seconds:
        """Prompt tokens that a step computes at most."""
        batch = np.where(self.table.batch_tokens > 0, self.table.batch_tokens, UNKNOWN_BATCH)
        chunk: Seconds = np.maximum(LEAST_BUDGET, batch - self.num_decoding)
        return chunk

    @cached_property
    def decode_step_s(self) -> Seconds:
        """A step there without prompts, now."""
        unit = self.table.seconds
        step: Seconds = unit[:, 0] + self.num_decoding * (unit[:, 1] + self.context * unit[:, 2])
        return step

    @cached_property
    def own_prefill_s(self) -> Seconds:
        """Computing the prompt there, without what waits before it; what is in a lower tier has to be brought back."""
        unit, prefixes, demand = self.table.seconds, self.candidates.prefixes, self.demand
        before = demand.num_prompt_tokens - self.uncached + 0.5 * self.uncached
        own = self.uncached * (self.decode_step_s / self.chunk + unit[:, 3] + before * unit[:, 4])
        if prefixes.in_pool is not prefixes.cached:
            own = own + (prefixes.cached - prefixes.in_pool) * (self.candidates.lower_tier_tokens * unit[:, 3])
        return own

    @cached_property
    def prefill_s(self) -> Seconds:
        """Until the prompt has been computed there: the step that runs, what waits, and the prompt itself."""
        unit, waiting = self.table.seconds, self.table.prefill_tokens
        queued = waiting * (self.decode_step_s / self.chunk + unit[:, 3] + self.table.looked_back * unit[:, 4])
        prefill: Seconds = self.decode_step_s + queued + self.own_prefill_s
        return prefill

    @cached_property
    def handoff_s(self) -> Seconds:
        """What it adds to the first token that the KV has to be moved to a worker."""
        missing = np.maximum(0, self.demand.num_prompt_blocks - self.candidates.prefixes.in_pool)
        handoff: Seconds = self.candidates.handoff_s + missing * self.candidates.handoff_block_s
        return handoff

    # ---- the answer ----

    @cached_property
    def tpot_s(self) -> Seconds:
        """Between two tokens of the answer, with the sequences that are or will be there, and with the prompts that wait there."""
        unit, demand = self.table.seconds, self.demand
        own_context = demand.num_prompt_tokens + 0.5 * demand.num_output_tokens
        num_others = self.table.num_sequences
        step = unit[:, 0] + (num_others + 1) * unit[:, 1] + (num_others * self.context + own_context) * unit[:, 2]
        tpot: Seconds = step + self.table.prefill_tokens * unit[:, 3] / demand.num_output_tokens
        return tpot

    @cached_property
    def slowing_s(self) -> Seconds:
        """What all that decodes there loses together by one more sequence."""
        unit, demand = self.table.seconds, self.demand
        own_context = demand.num_prompt_tokens + 0.5 * demand.num_output_tokens
        each = unit[:, 1] + own_context * unit[:, 2]
        slowing: Seconds = (demand.num_output_tokens * self.table.num_sequences) * each
        return slowing

    # ---- where the prompt is computed ----

    @cached_property
    def compute_cost_s(self) -> Seconds:
        """Of the prompt: until it has been computed, and what those lose that decode there and wait meanwhile."""
        cost: Seconds = self.prefill_s + self.num_decoding * self.own_prefill_s
        return cost

    @cached_property
    def remote_cost_s(self) -> Seconds:
        """For each worker that would decode: the prompt computed by the best of the others, and moved there."""
        return self._of_best_other(self.compute_cost_s) + self.handoff_s

    @cached_property
    def local_cost_s(self) -> Seconds:
        """The prompt computed where it decodes; infinite for who may not."""
        may = self.candidates.computes | self.candidates.short
        cost: Seconds = np.where(may, self.compute_cost_s, np.inf)
        return cost

    @cached_property
    def ttft_s(self) -> Seconds:
        """Until the first token, if the worker decodes, whichever way is better."""
        is_local = self.local_cost_s <= self.remote_cost_s
        remote = self._of_best_other(self.compute_cost_s, self.prefill_s) + self.handoff_s
        ttft: Seconds = np.where(is_local, self.prefill_s, remote)
        return ttft

    def _of_best_other(self, rank: Seconds, value: Seconds | None = None) -> Seconds:
        """For each worker: `value` (or the rank) of the prefill worker that ranks first and is not itself."""
        value = rank if value is None else value
        rank = np.where(self.candidates.prefills, rank, np.inf)
        best = np.full(len(rank), np.inf)
        if not len(rank):
            return best
        first = int(rank.argmin())
        if rank[first] < np.inf:
            best[:] = value[first]
            rank[first] = np.inf
            second = int(rank.argmin())
            best[first] = value[second] if rank[second] < np.inf else np.inf
        return best
