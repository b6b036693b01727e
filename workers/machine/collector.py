"""Keeps full garbage collections short: they hold the interpreter's lock while they look at every object that they know. Knows no work."""

from __future__ import annotations

import gc


def leave_what_is_there() -> None:
    """What this process has loaded and made by now (hundreds of thousands of objects: torch, pydantic, a model) is looked at no more.

    For a process that has started and will serve: a full collection took it 60 to 300 ms, in which nobody's token was sent.
    """
    gc.collect()
    gc.freeze()
