"""The simulated store, as far as membership needs it: leases that end unless renewed, watchers, outages; and what keeps workers registered in it."""

from __future__ import annotations

from collections.abc import Callable

from cluster.sim.product import ABSENT, SETTLE_S, WORKERS, Entry, Registration, Snapshot
from cluster.sim.timeline import Timeline, Timer


class SimStore:
    """A store with leases and compare-and-set, as far as the cluster's parts use it. While it is away nothing can be read or written, and leases
    run out as they do in Redis. Registrations have leases of `ttl_s`."""

    def __init__(self, timeline: Timeline, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.is_away = False
        self._timeline = timeline
        self._epoch = 1
        self._version = 0
        self._entries: dict[str, tuple[Entry, float]] = {}
        """With when each one ends."""
        self._watchers: dict[str, tuple[str, Callable[[Snapshot], None]]] = {}
        self._changed: set[str] = set()
        """Names of watchers that are told next."""
        self._notice: Timer | None = None

    def watch(self, name: str, hear: Callable[[Snapshot], None], prefix: str = WORKERS) -> None:
        """`hear` is called soon with what is there under the prefix, and after changes."""
        self._watchers[name] = prefix, hear
        self._tell(prefix, {name})

    def unwatch(self, name: str) -> None:
        self._watchers.pop(name, None)

    def compare_and_set(self, key: str, version: int, value: str, ttl_s: float | None) -> int | None:
        """As a Store's; the caller has seen that the store is there."""
        known = self._entries.get(key)
        if version != (known[0].version if known is not None else ABSENT):
            return None
        return self.put(key, value, ttl_s)

    def put(self, key: str, value: str, ttl_s: float | None) -> int:
        known = self._entries.get(key)
        self._version += 1
        self._entries[key] = Entry(key, value, self._version), self._timeline.now + (ttl_s or float("inf"))
        if ttl_s is not None:
            self._timeline.after(ttl_s, self._expire, key)
        if known is None or known[0].value != value:
            self._tell(key)
        return self._version

    def prolong(self, key: str, version: int, ttl_s: float) -> bool:
        """As a Store's renew."""
        known = self._entries.get(key)
        if known is None or known[0].version != version:
            return False
        self._entries[key] = known[0], self._timeline.now + ttl_s
        return True

    def remove(self, key: str, version: int) -> None:
        """`version` 0: whichever is there."""
        known = self._entries.get(key)
        if known is not None and version in (0, known[0].version):
            del self._entries[key]
            self._tell(key)

    def write(self, registration: Registration) -> bool:
        """A registration with a fresh lease; False: the store is away, or holds a later generation of the worker."""
        if self.is_away:
            return False
        known = self._entries.get(registration.key)
        if known is not None:
            earlier = Registration.decode(known[0].value)
            if earlier is not None and earlier.address.generation > registration.address.generation:
                return False
        self.put(registration.key, registration.encode(), self.ttl_s)
        return True

    def renew(self, registration: Registration) -> bool:
        """Prolongs the lease of exactly this registration; False: it is not there, or the store is away."""
        known = self._entries.get(registration.key)
        if self.is_away or known is None or known[0].value != registration.encode():
            return False
        return self.prolong(registration.key, known[0].version, self.ttl_s)

    def go_away(self) -> None:
        self.is_away = True

    def come_back(self, is_empty: bool) -> None:
        """With `is_empty` it has lost all it held."""
        self.is_away = False
        if is_empty:
            self._epoch += 1
            self._entries.clear()
        self._tell("", set(self._watchers))

    def _expire(self, key: str) -> None:
        known = self._entries.get(key)
        if known is None:
            return
        if known[1] > self._timeline.now:
            if known[1] < float("inf"):
                self._timeline.at(known[1], self._expire, key)
            return
        del self._entries[key]
        self._tell(key)

    def _tell(self, key: str, names: set[str] | None = None) -> None:
        self._changed |= (
            {name for name, (prefix, _) in self._watchers.items() if key.startswith(prefix)} if names is None else names
        )
        if self._notice is None and self._changed:
            self._notice = self._timeline.after(SETTLE_S, self._told)

    def _told(self) -> None:
        self._notice = None
        if self.is_away:
            return
        changed, self._changed = self._changed, set()
        for name in sorted(changed):
            if name in self._watchers:
                prefix, hear = self._watchers[name]
                entries = tuple(self._entries[key][0] for key in sorted(self._entries) if key.startswith(prefix))
                hear(Snapshot(str(self._epoch), entries))


class Registered:
    """Keeps one worker process in the store, as cluster.registration does: renews three times a lease, registers again when that fails.

    `reaches()`: the network lets the worker through to the store.
    """

    def __init__(
        self,
        store: SimStore,
        registration: Registration,
        defer: Callable[..., bool],
        reaches: Callable[[], bool],
        timeline: Timeline,
    ) -> None:
        self._reaches = reaches
        self._store = store
        self._registration = registration
        self._defer = defer
        self._timeline = timeline
        self._is_written = False
        self._renew()

    def change(self, registration: Registration) -> None:
        """The worker has another role or generation."""
        self._registration = registration
        self._is_written = self._reaches() and self._store.write(registration)

    def _renew(self) -> None:
        if self._defer(self._renew):
            return
        if self._reaches() and not (self._is_written and self._store.renew(self._registration)):
            self._is_written = self._store.write(self._registration)
        self._timeline.after(self._store.ttl_s / 3, self._renew)
