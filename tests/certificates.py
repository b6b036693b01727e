"""Certificates of a small cluster for tests, made once for a process; and channels of strangers."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from cluster.identity.authority import Authority, Pair
from cluster.identity.folder import LOCAL_DAYS, add, config_of, make_folder
from workers.trust.credentials import Credentials
from workers.trust.parties import Party


@cache
def folder() -> Path:
    """Of the one cluster."""
    made = Path(tempfile.mkdtemp(prefix="baton-test-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    make_folder(made, (), LOCAL_DAYS)
    return made


@cache
def credentials(*parties: Party) -> Credentials:
    """Of a process that is all of these parties."""
    add(folder(), [parties], LOCAL_DAYS)
    return Credentials(config_of(folder()), parties[0])


@cache
def foreign_pair(*parties: Party) -> Pair:
    """The same names by an authority that nobody here believes."""
    return Authority.make(LOCAL_DAYS).issue(parties, LOCAL_DAYS)
