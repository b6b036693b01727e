"""Reads the file of tenants: their limits and their keys. Knows no store and no router."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from cluster.config import read_file
from cluster.settings import build
from router.config import hashed
from router.tenants.config import TenantLimits
from router.tenants.roster import Key
from workers.config import Text
from workers.errors import InvalidConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class FileKey:
    """A key, or its hash as `sha256:HEX`; only hashes are kept."""

    key: Text
    expires: datetime | None = None
    """In UTC where it names no zone; none: never."""


@dataclass(frozen=True, slots=True)
class FileTenant(TenantLimits):
    """What stands under a tenant's name."""

    keys: tuple[FileKey, ...] = ()


@dataclass(frozen=True, slots=True)
class TenantsFile:
    tenants: Mapping[str, TenantLimits]
    keys: tuple[Key, ...]


def check_name(name: object, what: str) -> str:
    """Raises InvalidConfig for what is no name of a tenant or key."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{what} takes 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first; it is {name!r:.100}"
        )
    return name


def read_tenants(path: Path, max_tenants: int) -> TenantsFile:
    """Raises InvalidConfig naming the setting that is wrong."""
    written = read_file(path)
    named = written.pop("tenants", None)
    if written or not isinstance(named, Mapping):
        raise InvalidConfig(
            f"{path} must hold `tenants:`, and under it a name for each with its settings, and nothing else"
        )
    if len(named) > max_tenants:
        raise InvalidConfig(f"{path} names {len(named)} tenants; router.tenants.max_tenants allows {max_tenants}")
    tenants: dict[str, TenantLimits] = {}
    keys: dict[bytes, Key] = {}
    for name, settings in named.items():
        place = f"tenants.{check_name(name, 'the name of a tenant')}"
        tenant = build(FileTenant, {} if settings is None else settings, place)
        tenants[name] = TenantLimits(**{field.name: getattr(tenant, field.name) for field in fields(TenantLimits)})
        for at, each in enumerate(tenant.keys):
            digest = bytes.fromhex(hashed(each.key).removeprefix("sha256:"))
            if digest in keys:
                raise InvalidConfig(f"{place}.keys[{at}] is also a key of {keys[digest].tenant}: a key has one tenant")
            keys[digest] = Key(f"{name}-{at}", name, digest, _seconds(each.expires))
    return TenantsFile(tenants, tuple(keys.values()))


def _seconds(at: datetime | None) -> float:
    if at is None:
        return 0.0
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
