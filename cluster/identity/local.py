"""Certificates of a cluster that was given none: made at its start, in a folder that is gone at its end, and found there by those who join."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.identity.folder import LOCAL_DAYS, add, check_owner, config_of, make_folder, members
from cluster.store.store import Store
from workers.errors import InvalidConfig
from workers.trust.config import TlsConfig
from workers.trust.parties import Party

_KEY = "tls/folder"
"""In the store: where the cluster's certificates are. Nothing secret, and not believed: see `join`."""


def needs_certificates(tls: TlsConfig) -> bool:
    return tls.mode == "on" and not tls.has_files


def certified(config: ClusterConfig, folder: str) -> ClusterConfig:
    """The cluster with certificates for all its processes, made below `folder`."""
    workers = [name for name, _ in config.pools.workers]
    routers = [f"router-{at}" for at in range(config.pools.routers)]
    made = Path(folder, "tls")
    make_folder(made, members(workers, routers), LOCAL_DAYS)
    return replace(config, tls=config_of(made))


async def publish(store: Store, config: ClusterConfig) -> None:
    """Tells those who join this cluster from the same host where its certificates are."""
    if config.tls.has_files:
        await store.put(_KEY, str(Path(config.tls.ca).parent))
    else:
        await store.delete(_KEY)


async def join(store: Store, own: Iterable[tuple[Party, ...]]) -> TlsConfig:
    """Makes the certificate of one who joins in the folder of a cluster on this host. Raises InvalidConfig.

    Who can write to the store could name another folder; one that is not this user's alone is refused.
    """
    found = await store.get(_KEY)
    folder = Path(found.value) if found is not None else None
    try:
        if folder is None or not folder.is_absolute():
            raise InvalidConfig("the cluster names no folder of certificates")
        check_owner(folder)
        add(folder, own, LOCAL_DAYS)
    except InvalidConfig as error:
        raise InvalidConfig(
            f"{error}; on another host than `baton serve`, make a certificate with `baton tls` and name its files in "
            "tls.cert, tls.key and tls.ca"
        ) from error
    return config_of(folder)
