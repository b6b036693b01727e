"""Who there is: tenants by name, and their keys by hash; finds whose key it is that a client shows. Plain values, read by every request."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.tenants.config import TenantLimits

DEFAULT_TENANT = "default"
"""Of keys that name none: those of router.api.api_keys."""


@dataclass(frozen=True, slots=True)
class Key:
    """`digest` is the SHA-256 of the key. Times in seconds since 1970; 0: never."""

    key_id: str
    tenant: str
    digest: bytes
    expires_s: float = 0.0
    revoked_s: float = 0.0
    is_stored: bool = False
    """It stands in the store, and not in a file or the settings."""


@dataclass(frozen=True, slots=True)
class Roster:
    """At one moment."""

    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)
    keys: Mapping[bytes, Key] = field(default_factory=dict)
    """By digest."""
    defaults: TenantLimits = field(default_factory=TenantLimits)

    def find(self, digest: bytes) -> Key | None:
        """Looking a digest up tells by its timing something of digests at most, which are no keys; what is found is compared whole."""
        key = self.keys.get(digest)
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def limits(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self.defaults)


def roster_of(
    tenants: Mapping[str, TenantLimits], keys: tuple[Key, ...], defaults: TenantLimits, max_keys: int
) -> Roster:
    """Of keys with the same digest the first counts, and of more than there may be the first ones."""
    by_digest: dict[bytes, Key] = {}
    for key in keys:
        if len(by_digest) < max_keys:
            by_digest.setdefault(key.digest, key)
    return Roster(dict(tenants), by_digest, defaults)
