"""What one request would take on each worker, in seconds, from the columns of the table and what was learnt of times. Chooses nothing.

All are vector operations over the workers.
"""

from __future__ import annotations

import numpy as np

from router.fleet.worker_table import LENT_S, Flags, Numbers, Seconds
from router.policies.policy import Candidates, Demand

UNKNOWN_BATCH = 512
"""Tokens of a step where a worker has not said."""
PACE_MARGIN = 0.9
"""Of a target between two tokens, what is planned with."""
MOST_LENT = 0.9
"""Of a worker's time, as what prompts take at most."""
LEAST_BUDGET = 64
"""Tokens of a step that are left for prompts, however many sequences decode."""


class Outlook:
    """[N] arrays, a row a worker. What a worker's steps take is known from its kind until it has computed some itself."""

    def __init__(self, demand: Demand, candidates: Candidates) -> None:
        self.demand = demand
        self.candidates = candidates
        self.table = table = candidates.table
        step_s, decode_s, context_s, prompt_s, look_s = table.seconds.T
        prefixes, num_prompt, num_output = candidates.prefixes, demand.num_prompt_tokens, demand.num_output_tokens

        self.uncached: Numbers = np.maximum(1, num_prompt - prefixes.cached * demand.block_size)
        """Tokens of the prompt that a worker would compute; the last one at least."""
        self.num_decoding: Seconds = np.minimum(table.steps[:, 1], table.num_sequences)
        """Sequences that get a token with each step there, now."""
        self.context: Seconds = table.steps[:, 2] / np.maximum(1.0, table.steps[:, 1])
        """Tokens of a sequence that decodes there, on average, in the last step."""
        batch = np.where(table.batch_tokens > 0, table.batch_tokens, UNKNOWN_BATCH)
        self.chunk: Seconds = np.maximum(LEAST_BUDGET, batch - self.num_decoding)
        """Prompt tokens that a step computes at most."""
        self.decode_step_s: Seconds = step_s + self.num_decoding * (decode_s + self.context * context_s)
        """A step there without prompts, now."""
        token_s = self.decode_step_s / self.chunk + prompt_s

        before = num_prompt - self.uncached + 0.5 * self.uncached
        self.own_prefill_s: Seconds = self.uncached * (token_s + before * look_s)
        """Computing the prompt there, without what waits before it; what is in a lower tier has to be brought back."""
        if prefixes.in_pool is not prefixes.cached:
            lower = (prefixes.cached - prefixes.in_pool) * (candidates.lower_tier_tokens * prompt_s)
            self.own_prefill_s = self.own_prefill_s + lower
        queued_s = table.prefill_tokens * (token_s + table.looked_back * look_s)
        self.prefill_s: Seconds = self.decode_step_s + queued_s + self.own_prefill_s
        """Until the prompt has been computed there: the step that runs, what waits, and the prompt itself."""
        missing = np.maximum(0, demand.num_prompt_blocks - prefixes.in_pool)
        self.handoff_s: Seconds = candidates.handoff_s + missing * candidates.handoff_block_s
        """What it adds to the first token that the KV has to be moved to a worker."""

        own_context = num_prompt + 0.5 * num_output
        num_others = table.num_sequences
        last_s = step_s + (num_others + 1) * decode_s + (num_others * self.context + own_context) * context_s
        lent = np.where(num_others > 0, np.minimum(MOST_LENT, table.lent_s / LENT_S), 0.0)
        self.tpot_s: Seconds = last_s / (1 - lent) + table.prefill_tokens * prompt_s / num_output
        """Between two tokens of the answer, with the sequences that are or will be there, with the prompts that wait there, and with as
        many more as came lately."""
        self.slowing_s: Seconds = (num_output * num_others) * (decode_s + own_context * context_s)
        """What all that decodes there loses together by one more sequence."""

        self.strain: Seconds | None = None
        if demand.tpot_s:
            self.strain = self._strain(lent + (queued_s + self.own_prefill_s) / LENT_S, demand.tpot_s)
        """0 to 1: how much of the time that the target between two tokens leaves for prompts there would be used with this one. None: there is
        no target, and others lose all that the prompt takes."""
        lost_s = self.num_decoding * self.own_prefill_s
        self.compute_cost_s: Seconds = self.prefill_s + (lost_s if self.strain is None else lost_s * self.strain**3)
        """Of the prompt: until it has been computed, and what those lose that decode there and wait meanwhile: little, while all keep the
        target."""
        self.remote_cost_s: Seconds = self._of_best_other(self.compute_cost_s, self.compute_cost_s) + self.handoff_s
        """For each worker that would decode: the prompt computed by the best of the others, and moved there."""
        self.computes: Flags = candidates.computes | (
            candidates.short if self.strain is None else candidates.short & (self.strain < 1)
        )
        """Who may compute the prompt of what it decodes: a DECODE worker only while what decodes there keeps its target with it."""
        self.local_cost_s: Seconds = np.where(self.computes, self.compute_cost_s, np.inf)
        """The prompt computed where it decodes; infinite for who may not."""

    def _strain(self, lent: Seconds, tpot_s: float) -> Seconds:
        """`lent`: the share of its time that prompts would take from sequences that decode there."""
        left = 1 - self.decode_step_s / (PACE_MARGIN * tpot_s)
        strain: Seconds = np.where(left > lent, lent / np.maximum(left, 1e-9), 1.0)
        return strain

    @property
    def decodes(self) -> Flags:
        """Candidates that decode and have somebody to compute the prompt: themselves or another one."""
        prefills = self.candidates.prefills
        able: Flags = self.candidates.decodes & (self.computes | (prefills.sum() > prefills))
        return able

    @property
    def ttft_s(self) -> Seconds:
        """Until the first token, if the worker decodes, whichever way is better."""
        is_local = self.local_cost_s <= self.remote_cost_s
        remote = self._of_best_other(self.compute_cost_s, self.prefill_s) + self.handoff_s
        ttft: Seconds = np.where(is_local, self.prefill_s, remote)
        return ttft

    def _of_best_other(self, rank: Seconds, value: Seconds) -> Seconds:
        """For each worker: `value` of the prefill worker that ranks first and is not itself."""
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
