"""The parts that policies are made of: each says what a worker costs one request, in seconds, or which workers are out of the question.

A policy adds up the costs that it names and takes the least.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from router.fleet.worker_table import Flags, Numbers, Seconds
from router.policies.outlook import Outlook
from router.policies.policy import tie_break

Scorer = Callable[[Outlook], Seconds | Numbers]
Filter = Callable[[Outlook, Flags], Flags]

MISSING_BLOCK_S = 1e6
"""One block without room outweighs whatever takes time."""
LATE = 10.0
"""A second beyond a target counts as so many."""
AWAY_FROM_HOME_S = 1.0
"""What a session that goes to another worker than before counts."""


# ---- costs ----


def first_token(outlook: Outlook) -> Seconds:
    """Until the first token, the better of computing the prompt here or elsewhere, with what others lose by it."""
    cost: Seconds = np.minimum(outlook.local_cost_s, outlook.remote_cost_s)
    return cost


def answer(outlook: Outlook) -> Seconds:
    """The rest of the answer, with what others lose by it."""
    cost: Seconds = outlook.demand.num_output_tokens * outlook.tpot_s + outlook.slowing_s
    return cost


def kv_headroom(outlook: Outlook) -> Seconds:
    """Blocks of prompt and answer that a worker has no room for."""
    demand, prefixes = outlook.demand, outlook.candidates.prefixes
    missing = demand.num_blocks - prefixes.in_pool - outlook.table.free_blocks
    cost: Seconds = np.maximum(0, missing) * MISSING_BLOCK_S
    return cost


def lateness(outlook: Outlook) -> Seconds:
    """How far a worker would miss the targets of the request."""
    demand, cost = outlook.demand, np.zeros(len(outlook.table))
    if demand.ttft_s:
        cost += LATE * np.maximum(0.0, outlook.ttft_s - demand.ttft_s)
    if demand.tpot_s:
        cost += LATE * demand.num_output_tokens * np.maximum(0.0, outlook.tpot_s - demand.tpot_s)
    return cost


def home(outlook: Outlook) -> Seconds:
    """A session's worker, by rendezvous hashing over all that can decode: it needs no table, and routers agree without talking."""
    cost = np.zeros(len(outlook.table))
    if outlook.demand.session and outlook.table.can_decode.any():
        ties = np.where(outlook.table.can_decode, tie_break(outlook.demand.session, outlook.table.seeds), np.uint64(0))
        cost += AWAY_FROM_HOME_S
        cost[int(ties.argmax())] = 0.0
    return cost


def prompt(outlook: Outlook) -> Seconds:
    """Until the prompt has been computed by a worker, with what others lose by it."""
    return outlook.compute_cost_s


def uncached(outlook: Outlook) -> Numbers:
    return outlook.uncached


def sequences(outlook: Outlook) -> Numbers:
    return outlook.table.num_sequences


def waiting_tokens(outlook: Outlook) -> Numbers:
    return outlook.table.prefill_tokens


# ---- filters: what is left of the candidates; all of them where nothing would be left ----


def not_avoided(outlook: Outlook, may: Flags) -> Flags:
    """Not the worker that has just failed the request."""
    avoid = outlook.demand.avoid
    if avoid < 0 or not may[avoid]:
        return may
    others = may.copy()
    others[avoid] = False
    return others if others.any() else may


def keeps_pace(outlook: Outlook, may: Flags) -> Flags:
    """Those that would give the request's tokens within its target."""
    if not outlook.demand.tpot_s:
        return may
    fast = may & (outlook.tpot_s <= outlook.demand.tpot_s)
    return fast if fast.any() else may
