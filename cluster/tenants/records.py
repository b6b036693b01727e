"""How keys stand in the store, and the secret that the names of tenants' blocks are made with. Knows no router."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets

from cluster.store.open import cluster_secret
from cluster.store.store import ABSENT, Entry, Store, StoreConfig
from router.tenants.roster import Key

KEYS = "keys/"
"""By id, without a lease. Only hashes of keys."""
SALT_SECRET = "tenants/secret"
MAX_RECORD_CHARACTERS = 1024


def encode_key(key: Key) -> str:
    return json.dumps(
        {
            "tenant": key.tenant,
            "sha256": key.digest.hex(),
            "expires_s": key.expires_s,
            "revoked_s": key.revoked_s,
        }
    )


def decode_key(entry: Entry) -> Key | None:
    """None for what is no key: a stranger's entry must not take a router down."""
    if len(entry.value) > MAX_RECORD_CHARACTERS:
        return None
    try:
        record = json.loads(entry.value)
        tenant, digest = record["tenant"], bytes.fromhex(record["sha256"])
        expires_s, revoked_s = float(record["expires_s"]), float(record["revoked_s"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if not isinstance(tenant, str) or not tenant or len(digest) != 32:
        return None
    if not (math.isfinite(expires_s) and math.isfinite(revoked_s)):
        return None
    return Key(entry.key.removeprefix(KEYS), tenant, digest, expires_s, revoked_s, is_stored=True)


async def salt_secret(store: Store, config: StoreConfig) -> bytes:
    """The same for all routers of the cluster: made from the secret of its entries in Redis, where it has one, so that blocks on disk
    are found again after a start with the same one; else one that the first router puts into the store."""
    if config.url != "memory":
        return hmac.new(cluster_secret(config).encode(), b"salts of tenants", hashlib.sha256).digest()
    while True:
        entry = await store.get(SALT_SECRET)
        if entry is not None:
            return entry.value.encode()
        await store.compare_and_set(SALT_SECRET, ABSENT, secrets.token_hex(32))
