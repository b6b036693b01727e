"""Says which faults there are, at which steps they can strike, and draws the plan of a run from a seed. Injects nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Step(StrEnum):
    """A moment in the life of a request: the message that marks it is about to be passed on (RELEASED: has been)."""

    SUBMIT = "submit"
    OPEN = "open"
    ACCEPTED = "accepted"
    CHOSEN = "chosen"
    FIRST_PIECE = "first_piece"
    MIDDLE_PIECE = "middle_piece"
    LAST_PIECE = "last_piece"
    FIRST_ACK = "first_ack"
    MIDDLE_ACK = "middle_ack"
    DONE = "done"
    RELEASE = "release"
    RELEASED = "released"
    MOVE = "move"
    """The router asks another decode worker to take the running request over."""
    FIRST_TOKEN = "first_token"
    MIDDLE_TOKEN = "middle_token"
    LAST_TOKEN = "last_token"


ROUTER_STEPS = (Step.SUBMIT, Step.MOVE, Step.FIRST_TOKEN, Step.MIDDLE_TOKEN, Step.LAST_TOKEN)
"""Seen on the stream between router and decode worker; the others are seen on the stream between two workers."""
HANDOFF_STEPS = tuple(step for step in Step if step not in ROUTER_STEPS)
CLIENT_STEPS = (Step.SUBMIT, Step.FIRST_TOKEN, Step.MIDDLE_TOKEN, Step.LAST_TOKEN)
"""Seen by clients."""
PIECE_STEPS = (Step.FIRST_PIECE, Step.MIDDLE_PIECE, Step.LAST_PIECE)


class Kind(StrEnum):
    """What goes wrong."""

    DROP = "drop"
    """The message is lost; what follows it arrives."""
    DELAY = "delay"
    DUPLICATE = "duplicate"
    OVERTAKE = "overtake"
    """The next message of the stream arrives before it."""
    CUT = "cut"
    """The connection is reset."""
    HALF_OPEN = "half_open"
    """Nothing gets through in either direction any more, and nobody is told."""
    SLOW = "slow"
    """A slow reader: a few kilobytes a second for a while."""
    KILL_PREFILL = "kill_prefill"
    KILL_DECODE = "kill_decode"
    STOP_PREFILL = "stop_prefill"
    """SIGSTOP, and SIGCONT when the others have given it up, or before."""
    STOP_DECODE = "stop_decode"
    ZOMBIE_PREFILL = "zombie_prefill"
    """SIGSTOP; a successor with a higher generation takes its place; SIGCONT."""
    ZOMBIE_DECODE = "zombie_decode"
    SWITCH_PREFILL = "switch_prefill"
    """A role switch: a new generation while transfers of the old one run."""
    SWITCH_DECODE = "switch_decode"
    LEAVE = "leave"
    """The client hangs up."""
    DATA_DROP = "data_drop"
    """On the data path: a piece never arrives."""
    DATA_DELAY = "data_delay"
    DATA_DUPLICATE = "data_duplicate"
    DATA_CORRUPT = "data_corrupt"
    DATA_CUT = "data_cut"
    """The transport breaks at a piece."""
    DATA_STALL = "data_stall"
    """The transport neither delivers a piece nor says so, until its own bound."""
    DATA_UNREACHABLE = "data_unreachable"
    """The receiver cannot connect over this transport."""
    KILL_ROUTER = "kill_router"
    """The router that the client talks to, where there are several."""


MESSAGE_KINDS = (Kind.DROP, Kind.DELAY, Kind.DUPLICATE, Kind.OVERTAKE)
LINE_KINDS = (Kind.CUT, Kind.HALF_OPEN, Kind.SLOW)
DATA_KINDS = tuple(kind for kind in Kind if kind.startswith("data_"))
PREFILL_KINDS = (Kind.KILL_PREFILL, Kind.STOP_PREFILL, Kind.ZOMBIE_PREFILL, Kind.SWITCH_PREFILL)
DECODE_KINDS = (Kind.KILL_DECODE, Kind.STOP_DECODE, Kind.ZOMBIE_DECODE, Kind.SWITCH_DECODE)
PROCESS_KINDS = (*PREFILL_KINDS, *DECODE_KINDS)
WORKER_KINDS = tuple(kind for kind in Kind if kind is not Kind.KILL_ROUTER)
"""What strikes where there is one router."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault for one request. `chance` in [0, 1) is the randomness that carrying it out may need."""

    kind: Kind
    step: Step
    transport: str
    chance: float
    is_move: bool = False
    """It strikes when the running request is handed to another decode worker, not when its prompt is handed over."""

    def __str__(self) -> str:
        return f"{self.transport}/{'move/' if self.is_move else ''}{self.step}/{self.kind}/{self.chance:.3f}"


def combinations() -> Iterator[tuple[Kind, Step]]:
    """Every fault at every step where it can strike."""
    for step in Step:
        for kind in Kind:
            if kind in MESSAGE_KINDS and step is Step.RELEASED:
                continue  # there is no further message
            if kind in PREFILL_KINDS and step in ROUTER_STEPS:
                continue  # a prefill worker has no part in these
            if kind in DATA_KINDS and step not in PIECE_STEPS:
                continue
            if kind is Kind.KILL_ROUTER and step not in CLIENT_STEPS:
                continue
            if kind is Kind.DATA_UNREACHABLE and step is not Step.FIRST_PIECE:
                continue  # connecting happens once
            yield kind, step


def is_gentle(kind: Kind, step: Step) -> bool:
    """Whether only the request's own transfer is harmed, not all that runs on a worker or over its router stream."""
    return kind not in PROCESS_KINDS and (step not in ROUTER_STEPS or kind in (Kind.DELAY, Kind.SLOW, Kind.LEAVE))


def draw_plan(
    seed: int, transport: str, num_requests: int, kinds: Sequence[Kind] = WORKER_KINDS, is_move: bool = False
) -> list[Fault | None]:
    """A fault for each request, or None for about every tenth: each combination once, in random order, then again.

    The gentle ones come before the others, so that the table shows how each is overcome and not only that requests are
    run again because their worker has died of another fault.
    """
    dice = random.Random(f"{seed}/{transport}")
    plan: list[Fault | None] = []
    while len(plan) < num_requests:
        steps = (*HANDOFF_STEPS, Step.MOVE) if is_move else tuple(step for step in Step if step is not Step.MOVE)
        deck = [(kind, step) for kind, step in combinations() if kind in kinds and step in steps]
        dice.shuffle(deck)
        for kind, step in deck:
            plan += [None] if dice.random() < 0.1 else []
            plan.append(Fault(kind, step, transport, round(dice.random(), 3), is_move))
    return sorted(plan[:num_requests], key=lambda fault: fault is not None and not is_gentle(fault.kind, fault.step))
