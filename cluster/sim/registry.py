"""The simulated store, as far as membership needs it: leases that end unless renewed, watchers, outages; and what keeps workers registered in it."""

from __future__ import annotations

from collections.abc import Callable

from cluster.sim.product import SETTLE_S, WORKERS, Entry, Registration, Snapshot
from cluster.sim.timeline import Timeline, Timer


class SimStore:
    """Holds registrations under leases of `ttl_s`. While it is away nothing can be written, and leases run out as they do in Redis."""

    def __init__(self, timeline: Timeline, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.is_away = False
        self._timeline = timeline
        self._epoch = 1
        self._version = 0
        self._entries: dict[str, tuple[Entry, float]] = {}
        self._watchers: dict[str, Callable[[Snapshot], None]] = {}
        self._notice: Timer | None = None

    def watch(self, name: str, hear: Callable[[Snapshot], None]) -> None:
        """`hear` is called soon with what is there, and after changes."""
        self._watchers[name] = hear
        self._tell()

    def unwatch(self, name: str) -> None:
        self._watchers.pop(name, None)

    def write(self, registration: Registration) -> bool:
        """A registration with a fresh lease; False: the store is away, or holds a later generation of the worker."""
        if self.is_away:
            return False
        known = self._entries.get(registration.key)
        if known is not None:
            earlier = Registration.decode(known[0].value)
            if earlier is not None and earlier.address.generation > registration.address.generation:
                return False
        self._version += 1
        entry = Entry(registration.key, registration.encode(), self._version)
        self._entries[registration.key] = (entry, self._timeline.now + self.ttl_s)
        self._timeline.after(self.ttl_s, self._expire, registration.key)
        if known is None or known[0].value != entry.value:
            self._tell()
        return True

    def renew(self, registration: Registration) -> bool:
        """Prolongs the lease of exactly this registration; False: it is not there, or the store is away."""
        known = self._entries.get(registration.key)
        if self.is_away or known is None or known[0].value != registration.encode():
            return False
        self._entries[registration.key] = (known[0], self._timeline.now + self.ttl_s)
        return True

    def go_away(self) -> None:
        self.is_away = True

    def come_back(self, is_empty: bool) -> None:
        """With `is_empty` it has lost all it held."""
        self.is_away = False
        if is_empty:
            self._epoch += 1
            self._entries.clear()
        self._tell()

    def _expire(self, key: str) -> None:
        known = self._entries.get(key)
        if known is None:
            return
        if known[1] > self._timeline.now:
            self._timeline.at(known[1], self._expire, key)
            return
        del self._entries[key]
        self._tell()

    def _tell(self) -> None:
        if self._notice is None:
            self._notice = self._timeline.after(SETTLE_S, self._told)

    def _told(self) -> None:
        self._notice = None
        if self.is_away:
            return
        entries = tuple(self._entries[key][0] for key in sorted(self._entries) if key.startswith(WORKERS))
        snapshot = Snapshot(str(self._epoch), entries)
        for hear in list(self._watchers.values()):
            hear(snapshot)


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
