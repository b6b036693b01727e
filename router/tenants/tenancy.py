"""What the HTTP API asks of tenants: whose key it is, whether its request may run now, and what it used. Runs the rations on asyncio; decides nothing itself."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from router.tenants.buckets import Buckets
from router.tenants.config import TenantLimits, TenantsConfig
from router.tenants.desk import TenantDesk
from router.tenants.rations import Kind, Rations, Reading, Shortage
from router.tenants.roster import DEFAULT_TENANT, Key, Roster, roster_of
from router.tenants.salts import Salts
from workers.errors import BatonError, Refusal, Refused

log = logging.getLogger(__name__)

CYCLE_S = 0.5
"""Between two looks at what is to be fetched or given back, when no request waits for it."""
NO_LIMITS = TenantLimits()
ASK_TIMEOUT_S = 1.0
"""A common store that takes longer is done without."""
ALONE_S = 5.0
"""It is asked again after so long: requests do not wait for it each time."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. `tenant` "": there are no tenants here."""

    tenant: str = ""
    limits: TenantLimits = NO_LIMITS
    key_id: str = ""
    owner: bytes = b""
    """What it has stored is found by who has the same."""


class Limited(BatonError):
    """A tenant's allowance does not reach."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(f"{shortage.kind} of this key's tenant")
        self.shortage = shortage


class Tenancy:
    """Of one router. All methods are called from its event loop, but for `set_roster`."""

    def __init__(
        self,
        config: TenantsConfig,
        api_keys: Sequence[str] = (),
        router_id: str = "router",
        secret: bytes = b"",
        desk: TenantDesk | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`api_keys` as `sha256:HEX`. Without a `desk` this router is the only one. `secret` is the cluster's; empty: one is made."""
        self.config = config
        self.needs_key = config.is_on or bool(api_keys)
        """Nobody is served without one."""
        self.salts = Salts(secret or secrets.token_bytes(32))
        self.desk = desk
        digests = [bytes.fromhex(key.removeprefix("sha256:")) for key in api_keys]
        self._own_keys = tuple(Key(f"config-{place}", DEFAULT_TENANT, each) for place, each in enumerate(digests))
        self._clock = clock
        self._wall = wall
        self._rations = Rations(router_id, config.slice_s, config.slice_share)
        self._alone = Buckets()
        """In place of the common ones where there are none, or while they do not answer."""
        self.is_alone = False
        """The common store did not answer when it was last asked: this router grants allowances by itself."""
        self._ask_again_s = 0.0
        self._round: asyncio.Future[None] | None = None
        """Ends with the next call for what is wanted now."""
        self._is_asked = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None
        self.set_roster({}, ())

    # ---- who there is ----

    def set_roster(self, tenants: Mapping[str, TenantLimits], keys: Sequence[Key]) -> None:
        """From now on these count, beside the keys of the configuration. From any thread."""
        config = self.config
        self.roster: Roster = roster_of(tenants, (*self._own_keys, *keys), config.defaults, config.max_keys)

    async def put_key(self, key: Key) -> None:
        """Keeps a key, new or changed, for all routers. Raises Refused where there is nowhere to, or BatonError."""
        if not self.config.is_on:
            raise Refused(
                Refusal.INVALID, "there are no tenants here: set router.tenants.enabled, or router.tenants.file"
            )
        if self.desk is None:
            raise Refused(Refusal.INVALID, "this router runs by itself, without a store that could keep keys")
        await self.desk.put_key(key)
        self.roster = replace(self.roster, keys={**self.roster.keys, key.digest: key})

    def caller(self, digest: bytes) -> Caller | Key | None:
        """Who shows a key with this SHA-256; the key itself where it does not count any more; None: nobody knows it."""
        key = self.roster.find(digest)
        if key is None:
            return None
        if key.revoked_s or (key.expires_s and key.expires_s <= self._wall()):
            return key
        if not self.config.is_on:
            return Caller(owner=digest)
        return Caller(key.tenant, self.roster.limits(key.tenant), key.key_id, key.tenant.encode())

    def salt(self, caller: Caller, own: str) -> int:
        """Of the names of blocks of its prompts; `own` is the request's cache_salt."""
        is_shared = self.config.shared_prefixes or caller.limits.shared_prefixes
        return self.salts.of("" if is_shared else caller.tenant, own)

    # ---- what they may use ----

    async def admit(self, caller: Caller, costs: Mapping[Kind, float]) -> None:
        """Returns when the request is paid for, mostly at once. Raises Limited."""
        shortage = self._rations.admit(caller.tenant, caller.limits, costs, self._clock())
        if shortage is not None and shortage.wait_s == 0:
            await asyncio.shield(self._next_round())
            shortage = self._rations.admit(caller.tenant, caller.limits, costs, self._clock(), is_last=True)
        if shortage is not None:
            raise Limited(shortage)

    def end(self, caller: Caller, extra: Mapping[Kind, float], num_places: int = 1) -> None:
        """A request that was admitted has ended; `extra` and `num_places` as in `Rations.end`."""
        self._rations.end(caller.tenant, caller.limits, extra, self._clock(), num_places)

    def readings(self, caller: Caller) -> list[Reading]:
        return self._rations.readings(caller.tenant, caller.limits, self._clock())

    async def close(self) -> None:
        """Nothing is fetched any more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    def _next_round(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        if self._round is None:
            self._round = loop.create_future()
        if self._asking is None or self._asking.done():
            self._asking = loop.create_task(self._keep_asking(), name="tenant-rations")
        self._is_asked.set()
        return self._round

    async def _keep_asking(self) -> None:
        while True:
            try:
                async with asyncio.timeout(CYCLE_S):
                    await self._is_asked.wait()
            except TimeoutError:
                pass
            self._is_asked.clear()
            waiting, self._round = self._round, None
            try:
                await self._ask()
            except Exception:
                log.exception("allowances of tenants could not be fetched")
            finally:
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)

    async def _ask(self) -> None:
        asks = self._rations.asks(self._clock())
        if not asks:
            return
        if self.desk is not None and (not self.is_alone or self._clock() >= self._ask_again_s):
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    given = await self.desk.ask(asks)
                self._rations.given(asks, given, self._clock())
                if self.is_alone:
                    log.warning("the store answers again: tenants' allowances are common to all routers")
                self.is_alone = False
                return
            except (BatonError, TimeoutError) as error:
                if not self.is_alone:
                    log.warning(
                        "the store does not answer (%s): this router grants tenants' allowances by itself", error
                    )
                self.is_alone, self._ask_again_s = True, self._clock() + ALONE_S
        now = self._clock()
        self._rations.given(asks, self._alone.ask(asks, now), now)
