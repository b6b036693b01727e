"""The folder with a cluster's certificates: an authority and a certificate for each of its processes, readable by its owner alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from cluster.identity.authority import Authority, Pair
from workers.errors import InvalidConfig
from workers.trust.config import NAME, TlsConfig
from workers.trust.parties import ADMIN, Party, router, worker

LOCAL_DAYS = 3650
"""A cluster on one host makes new certificates at each start; they outlast it."""
_CA = "ca"


def make_folder(folder: Path, parties: Iterable[tuple[Party, ...]], days: int) -> None:
    """A new authority with certificates; each is that of one process, named after its first party. Raises InvalidConfig."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(folder)
    if (folder / f"{_CA}.key").exists():
        raise InvalidConfig(f"{folder} has an authority already: `baton tls add` makes further certificates in it")
    authority = Authority.make(days)
    _write(folder, _CA, authority.pair)
    for own in parties:
        _write(folder, own[0].file_name, authority.issue(own, days))


def add(folder: Path, parties: Iterable[tuple[Party, ...]], days: int) -> None:
    """Certificates by the authority that a folder has; they replace those of the same names. Raises InvalidConfig."""
    check_owner(folder)
    authority = Authority(_read(folder))
    for own in parties:
        _write(folder, own[0].file_name, authority.issue(own, days))


def issue(ca_cert: Path, ca_key: Path, folder: Path, parties: Iterable[tuple[Party, ...]], days: int) -> None:
    """Certificates by an authority whose files are elsewhere, as those of a mounted Secret, into a folder that has no key of it.
    Raises InvalidConfig.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        pair = Pair(ca_cert.read_bytes(), ca_key.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"the authority's {error.filename} cannot be read: {error.strerror}") from error
    authority = Authority(pair)
    for own in parties:
        _write(folder, own[0].file_name, authority.issue(own, days))
    _write_file(folder, f"{_CA}.crt", pair.cert)


def config_of(folder: Path) -> TlsConfig:
    """Where processes find the files of a folder."""
    return TlsConfig("on", f"{folder}/{NAME}.crt", f"{folder}/{NAME}.key", f"{folder}/{_CA}.crt")


def members(worker_ids: Iterable[str], router_ids: Iterable[str], administers: bool = True) -> list[tuple[Party, ...]]:
    """What a cluster's certificates say; routers that administer switch roles and drain for whoever may ask them to."""
    of_workers: list[tuple[Party, ...]] = [(worker(name),) for name in worker_ids]
    return of_workers + [(router(name), ADMIN) if administers else (router(name),) for name in router_ids]


def check_owner(folder: Path) -> None:
    """Raises InvalidConfig unless the folder belongs to this user, and nobody else may look into it."""
    try:
        found = os.stat(folder, follow_symlinks=False)
    except OSError as error:
        raise InvalidConfig(f"there is no folder of certificates at {folder}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise InvalidConfig(f"{folder} must be a folder of this user that nobody else can read (chmod 700)")


def _read(folder: Path) -> Pair:
    try:
        return Pair((folder / f"{_CA}.crt").read_bytes(), (folder / f"{_CA}.key").read_bytes())
    except OSError as error:
        raise InvalidConfig(f"the authority in {folder} cannot be read: {error.strerror}") from error


def _write(folder: Path, name: str, pair: Pair) -> None:
    """Each file at once, so that whoever reads meanwhile finds the old one or the new one whole."""
    for suffix, content in (("key", pair.key), ("crt", pair.cert)):
        _write_file(folder, f"{name}.{suffix}", content)


def _write_file(folder: Path, name: str, content: bytes) -> None:
    coming = folder / f".{name}.new"
    coming.unlink(missing_ok=True)
    descriptor = os.open(coming, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    coming.rename(folder / name)
