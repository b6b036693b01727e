"""The token that a Ray started by Baton asks for: who is to have it finds it in a file that only this user can read.

Without it anybody on the host could have Ray run code as this user. Ray takes a token from RAY_AUTH_TOKEN, or from the file
that RAY_AUTH_TOKEN_PATH names; its processes inherit both variables.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_PATH = "RAY_AUTH_TOKEN_PATH"


def given_token() -> str:
    """Where the operator has put a token: the path of a file, or the variable's name; empty: nowhere."""
    return _TOKEN if os.environ.get(_TOKEN) else os.environ.get(_PATH, "")


@contextmanager
def presented(path: str) -> Iterator[None]:
    """While it lasts, Ray in this process, and the processes that it starts, show and ask for the token in the file at `path`.

    An empty path: whatever the operator's variables say. Connections that are made meanwhile keep the token.
    """
    names = (_MODE, _TOKEN, _PATH)
    before = {name: os.environ[name] for name in names if name in os.environ}
    if path and path != _TOKEN:
        os.environ.pop(_TOKEN, None)
        os.environ[_PATH] = path
    if path:
        os.environ[_MODE] = "token"
    try:
        if "ray" in sys.modules:
            reread()
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def reread() -> None:
    """Ray reads the variables when it is imported, and keeps the token that it has read."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
