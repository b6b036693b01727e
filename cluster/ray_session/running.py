"""What a local cluster writes down about itself in its folder, so that further commands of this user find it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.ray_session.folders import living, secret_file, token_file

_RECORD = "running.json"


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster on this host: the process that keeps it, its Ray, and its routers once they serve."""

    folder: str
    pid: int
    ray_address: str
    urls: tuple[str, ...] = ()

    @property
    def token_file(self) -> str:
        """The token of its Ray."""
        return token_file(self.folder)

    @property
    def secret_file(self) -> str:
        """The secret of its entries in Redis, unless it was given one."""
        return secret_file(self.folder)

    def write(self) -> None:
        """Puts the record in the folder, in place of the last one."""
        coming = Path(self.folder, f"{_RECORD}.new")
        coming.write_text(json.dumps(asdict(self)))
        coming.rename(coming.with_name(_RECORD))


def note(folder: str, ray_address: str, urls: tuple[str, ...] = ()) -> None:
    """Writes down what this process runs in its folder."""
    Running(folder, os.getpid(), ray_address, urls).write()


def clusters() -> tuple[Running, ...]:
    """This user's clusters on this host whose processes live."""
    found = []
    for folder in living():
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is just starting, or just ending
            record = json.loads(Path(folder, _RECORD).read_text())
            urls = tuple(str(url) for url in record["urls"])
            found.append(Running(folder, int(record["pid"]), str(record["ray_address"]), urls))
    return tuple(found)


def with_ray(address: str) -> Running | None:
    """The cluster on this host whose Ray has this address."""
    host, _, port = address.rpartition(":")
    named = f"127.0.0.1:{port}" if host == "localhost" else address
    return next((each for each in clusters() if each.ray_address == named), None)
