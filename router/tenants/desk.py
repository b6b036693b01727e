"""What a router's tenants need of the cluster: the common allowances, and a place that keeps keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from router.tenants.buckets import Ask, Given
from router.tenants.roster import Key


class TenantDesk(Protocol):
    """Its methods are called from the router's event loop, and raise BatonError when the cluster does not answer."""

    async def ask(self, asks: Sequence[Ask]) -> Sequence[Given]:
        """What each of them gets of the common allowances, in their order."""
        ...

    async def put_key(self, key: Key) -> None:
        """Keeps a key, in place of what was kept of it. Routers hear of it a moment later."""
        ...
