"""Finds the slices that make a step fail by running it in ever smaller parts; knows no runner, no sequences and no blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from workers.errors import DeviceStuck, PoolsLost
from workers.runner import Sampled

MAX_TRIES = 32
"""Parts of one failed step that are tried, most of them small: one bad slice among 256 is alone after 16."""


@dataclass(slots=True)
class Isolated:
    """What became of each slice, by its place in the step. Slices that are in neither were not computed and may run again."""

    drawn: dict[int, Sampled] = field(default_factory=dict)
    failed: dict[int, Exception] = field(default_factory=dict)
    lost: PoolsLost | None = None
    """The runner lost what it held while a part of the step ran; that part has failed, and what came behind it was not tried."""


def isolate(num_slices: int, error: Exception, run: Callable[[range], list[Sampled]]) -> Isolated:
    """Called when a step of so many slices has failed with `error`. `run` computes a part of it, or raises.

    A part that fails is halved until it is a single slice, in at most MAX_TRIES runs; what is still together by then fails.
    Raises DeviceStuck as `run` does: no other part can be computed any more.
    """
    found = Isolated()
    parts = [(range(num_slices), error)]
    num_tries = 0
    while parts:
        part, why = parts.pop()
        if len(part) == 1 or num_tries + 2 > MAX_TRIES:
            found.failed |= dict.fromkeys(part, why)
            continue
        middle = len(part) // 2
        for half in (part[:middle], part[middle:]):
            num_tries += 1
            try:
                drawn = run(half)
            except PoolsLost as lost:
                found.lost = lost
                found.failed |= dict.fromkeys(half, lost)
                return found
            except DeviceStuck:
                raise
            except Exception as another:
                parts.append((half, another))
            else:
                found.drawn |= dict(zip(half, drawn, strict=True))
    return found
