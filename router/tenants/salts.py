"""Says what the names of a prompt's cached blocks begin with, so that who shares no salt shares no block. Knows no blocks and no tenants."""

from __future__ import annotations

import hashlib
import hmac


class Salts:
    """Made with a secret that all routers of a cluster share: a client cannot work out prompts whose blocks have another's names."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, tenant: str, own: str = "") -> int:
        """Unsigned 64 bit. `own` is what a client's cache_salt says; 0 where neither says anything."""
        if not tenant and not own:
            return 0
        told = b"%d:%b:%b" % (len(tenant.encode()), tenant.encode(), own.encode(errors="surrogatepass"))
        return int.from_bytes(hmac.new(self._secret, told, hashlib.sha256).digest()[:8], "little") or 1
