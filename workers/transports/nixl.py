"""KV by NIXL over UCX (shared memory, TCP, RDMA where there is any): the receiver reads the sender's registered pool. Knows no fabric.

NIXL cannot take a read back: over TCP, a read from a process that stands still went on into our memory when that process went on,
although its handle had been released and the peer removed (measured, NIXL 1.5.1). Therefore NIXL never writes into a pool. It
reads into slots that belong to this transport, and a helper thread copies a slot that is whole to where its pieces belong, as long
as somebody wants them, and makes their checksums on the way. A slot whose read hangs stays lent until the read has ended.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from workers.errors import TransferFailed
from workers.kv_memory.checksum import copy_and_checksum
from workers.kv_memory.memory import NONCE_BYTES, NONCE_PAGE_BYTES, KvLayout, KvMemory
from workers.machine.threads import started_threads
from workers.status import WorkerAddress
from workers.transports.channels import Channels
from workers.transports.contract import OutgoingPiece, View
from workers.transports.nixl_agent import NixlAgent, ReadState
from workers.transports.nixl_memory import NUM_SLOTS, SLOT_BYTES, RemotePool, RemoteSlice, Slots
from workers.transports.offers import decode, decode_hex, encode
from workers.transports.pull import NUM_HELPERS, Pairs, PullChannel, PullInbox

log = logging.getLogger(__name__)

MAX_PEERS = 64
"""Senders whose metadata is kept; the one that is idle and longest unused goes first."""
_CONNECT_S = 5.0
_SPIN_S = 200e-6
_NAP_S = 50e-6
_FIELDS: dict[str, type[int] | type[str]] = {"agent": str, "metadata": str, "address": int, "nonce": str}

Wanted = Callable[[], bool]


class NixlChannel(PullChannel):
    """Reads from one sender."""

    def __init__(self, owner: NixlTransport, source: WorkerAddress, offer: bytes, peer: str, pool: RemotePool) -> None:
        super().__init__(lambda: None if self.is_broken else pool, owner.helpers)
        self.source, self.offer = source, offer
        self.peer = peer
        self.is_broken = False
        self._owner = owner

    def inbox(self, transfer_id: str, place: Callable[[int], View]) -> NixlInbox:
        return self.keep(NixlInbox(self, place, self._owner))

    async def close(self) -> None:
        self.is_broken = True
        await super().close()
        await self._owner.leave(self.peer)


class NixlInbox(PullInbox):
    """As PullInbox, but all on helper threads: NIXL's calls block."""

    inline_bytes = 0

    def __init__(self, channel: NixlChannel, place: Callable[[int], View], owner: NixlTransport) -> None:
        super().__init__(channel, place, owner.helpers)
        self._nixl, self._owner = channel, owner

    def _copy(self, pairs: Pairs, arrived: set[int], is_large: bool) -> None:
        def is_wanted() -> bool:
            return not self._is_closed and self._channel.pool() is not None

        for group in _groups(pairs):
            try:
                found = self._owner.fetch(self._nixl.peer, [(view, source) for _, view, source in group], is_wanted)
            except TransferFailed as error:
                if is_wanted():
                    log.warning("KV could not be read from %s: %s", self._nixl.source.worker_id, error)
                    self._nixl.is_broken = True
                return
            for (piece, _, _), checksum in zip(group, found, strict=True):
                if checksum is not None:
                    self._checksums[piece] = checksum
                arrived.add(piece)


class NixlTransport:
    """Raises TransferFailed when NIXL cannot be started here. Nobody is checked by NIXL: whoever has an offer can reach the pool."""

    name = "nixl"
    is_pulled = True

    def __init__(self, memory: KvMemory, timeout_s: float) -> None:
        self._memory = memory
        self._timeout_s = timeout_s
        self._agent: NixlAgent | None = NixlAgent(f"baton-{uuid.uuid4().hex}")
        self.slots = Slots()
        # The nonce's page lies before the blocks: who reads it from there knows that it reads the right pool.
        pool = memory.bytes.ctypes.data - NONCE_PAGE_BYTES
        spans = [
            (pool, memory.bytes.nbytes + NONCE_PAGE_BYTES),
            (self.slots.bytes.ctypes.data, self.slots.bytes.nbytes),
        ]
        self._regions = [self._agent.register([span]) for span in spans]
        self._offer = encode(
            {
                "agent": self._agent.name,
                "metadata": base64.b64encode(self._agent.metadata()).decode(),
                "address": memory.bytes.ctypes.data,
                "nonce": memory.handle.nonce.hex(),
            }
        )
        self.helpers = started_threads(NUM_HELPERS, "kv-nixl")
        self._keeper = started_threads(1, "kv-nixl-keeper")
        """Lets go of what is unused, never behind a read that hangs: the worker's signs of life wait for `sweep`."""
        self._channels: Channels[NixlChannel] = Channels(MAX_PEERS)
        self._metadata: dict[str, bytes] = {}
        """Of each sender that NIXL knows, by the name of its agent."""
        self._num_users: Counter[str] = Counter()
        self._peers_lock = threading.Lock()

    # ---- as the sender ----

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        return None if self._agent is None else self._offer

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        """The receiver reads; nothing to do here."""

    # ---- as the receiver ----

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> NixlChannel:
        fields = decode(offer, _FIELDS)
        nonce = decode_hex(fields["nonce"], NONCE_BYTES)
        address = int(fields["address"])
        if not NONCE_PAGE_BYTES <= address < (1 << 63) - layout.pool_bytes:
            raise TransferFailed("an offer names no sensible address")
        try:
            metadata = base64.b64decode(str(fields["metadata"]), validate=True)
        except (binascii.Error, ValueError) as error:
            raise TransferFailed("the metadata of an offer is not base64") from error

        peer = str(fields["agent"])

        async def make() -> NixlChannel:
            loop = asyncio.get_running_loop()
            given_up = threading.Event()
            try:
                await loop.run_in_executor(self.helpers, self._open, peer, metadata, address, nonce, given_up)
            except asyncio.CancelledError:
                given_up.set()  # the thread goes on: it lets go of the peer itself
                raise
            return NixlChannel(self, source, offer, peer, RemotePool(address, layout))

        return await self._channels.get(source, offer, make)

    def _open(self, peer: str, metadata: bytes, address: int, nonce: bytes, given_up: threading.Event) -> None:
        """Makes a sender reachable. Raises TransferFailed unless its pool carries the nonce, or where nobody waits any more."""
        self._use_peer(peer, metadata)
        found = np.zeros(NONCE_BYTES, np.uint8)
        deadline_s = time.monotonic() + min(_CONNECT_S, self._timeout_s)
        try:
            source = RemoteSlice(address - NONCE_PAGE_BYTES, NONCE_BYTES)
            self.fetch(peer, [(found, source)], lambda: not given_up.is_set() and time.monotonic() < deadline_s)
            if found.tobytes() != nonce:
                raise TransferFailed("the sender's pool carries another nonce")
            if given_up.is_set():
                raise TransferFailed("nobody waits for it any more")
        except TransferFailed:
            self._leave_peer(peer)
            raise

    def _use_peer(self, peer: str, metadata: bytes) -> None:
        agent = self._running()
        with self._peers_lock:
            if peer in self._remove_unused():
                raise TransferFailed("earlier reads from it still hang")
            if peer not in self._metadata:
                name = agent.add_peer(metadata)
                if name != peer:
                    if name not in self._metadata:  # else it is in use under its own name
                        agent.remove_peer(name)
                    raise TransferFailed("an offer's metadata is another agent's than it says")
                self._metadata[peer] = metadata
            elif self._metadata[peer] != metadata:
                raise TransferFailed("an agent of that name has other metadata")
            self._num_users[peer] += 1

    def _leave_peer(self, peer: str) -> None:
        with self._peers_lock:
            self._num_users[peer] -= 1
            self._remove_unused()

    def _remove_unused(self) -> set[str]:
        """The peers that reads hang of, which stay: of a removed peer's read NIXL does not say any more whether it has ended."""
        hanging = self.slots.reclaim(self._running())
        for peer in [peer for peer in self._metadata if not self._num_users[peer] and peer not in hanging]:
            del self._metadata[peer], self._num_users[peer]
            try:
                self._running().remove_peer(peer)
            except TransferFailed as error:
                log.debug("%s", error)
        return hanging

    def fetch(self, peer: str, pairs: Sequence[tuple[View, RemoteSlice]], is_wanted: Wanted) -> list[int | None]:
        """Reads each source to its target, at most SLOT_BYTES in all unless it is one; their checksums, None where unknown.

        Blocking. Raises TransferFailed, also when nobody wants it any more; no target is written after that.
        """
        if len(pairs) == 1 and pairs[0][0].nbytes > SLOT_BYTES:
            target, source = pairs[0]
            for start in range(0, target.nbytes, SLOT_BYTES):
                part = target[start : start + SLOT_BYTES]
                self.fetch(peer, [(part, RemoteSlice(source.address + start, part.nbytes))], is_wanted)
            return [None]
        slot = self._take(is_wanted)
        view = self.slots.view(slot)
        homes: list[View] = []
        used = 0
        for target, _ in pairs:
            homes.append(view[used : used + target.nbytes])
            used += target.nbytes
        if not self._read(peer, slot, homes, [source for _, source in pairs], is_wanted):
            raise TransferFailed("a read was given up")
        try:
            if not is_wanted():
                raise TransferFailed("nobody wants it any more")
            return list(copy_and_checksum([target for target, _ in pairs], homes, used == SLOT_BYTES))
        finally:
            self.slots.give(slot)

    def _take(self, is_wanted: Wanted) -> int:
        deadline_s = time.monotonic() + self._timeout_s
        while (slot := self.slots.take()) is None:
            self.slots.reclaim(self._running())
            if not is_wanted() or time.monotonic() > deadline_s:
                raise TransferFailed(f"all {NUM_SLOTS} slots wait for reads that hang")
            time.sleep(_NAP_S)
        return slot

    def _read(
        self, peer: str, slot: int, homes: Sequence[View], sources: Sequence[RemoteSlice], is_wanted: Wanted
    ) -> bool:
        """Whether the slot holds the bytes. If not, it is given back by now, or lent until the read has ended."""
        agent = self._running()
        try:
            request = agent.read(
                peer, [(home.ctypes.data, home.nbytes) for home in homes], [(s.address, s.nbytes) for s in sources]
            )
        except TransferFailed:
            self.slots.give(slot)
            raise
        started_s = time.monotonic()
        while (state := agent.state(request)) is ReadState.RUNNING:
            elapsed_s = time.monotonic() - started_s
            if elapsed_s > self._timeout_s or not is_wanted():
                self.slots.lend(slot, peer, request)
                return False
            if elapsed_s > _SPIN_S:
                time.sleep(_NAP_S)
        agent.release(request)
        if state is ReadState.FAILED:
            self.slots.give(slot)
            raise TransferFailed("a read failed: the sender is gone, or its pool is")
        return True

    # ---- both ----

    async def sweep(self) -> None:
        """Takes back what reads have let go of."""
        if self._agent is not None and (self._metadata or self.slots.num_free < NUM_SLOTS):
            await asyncio.get_running_loop().run_in_executor(self._keeper, self._tidy)

    def _tidy(self) -> None:
        with self._peers_lock:
            self._remove_unused()

    async def leave(self, peer: str) -> None:
        """A channel was closed: its sender's metadata goes, as soon as no read from it hangs."""
        if self._agent is not None:
            await asyncio.get_running_loop().run_in_executor(self._keeper, self._leave_peer, peer)

    async def forget(self, worker_id: str) -> None:
        await self._channels.forget(worker_id)

    async def close(self) -> None:
        await self._channels.close()
        agent, self._agent = self._agent, None
        if agent is not None:
            await asyncio.get_running_loop().run_in_executor(self._keeper, self._end, agent)
            self.helpers.shutdown()
            self._keeper.shutdown()

    def _end(self, agent: NixlAgent) -> None:
        if self.slots.reclaim(agent):
            _abandoned.append(self.slots)
        for regions in self._regions:
            try:
                agent.deregister(regions)
            except TransferFailed as error:
                log.warning("%s", error)
        agent.close()

    def _running(self) -> NixlAgent:
        if self._agent is None:
            raise TransferFailed("this worker stops")
        return self._agent


_abandoned: list[Slots] = []
"""Slots of transports that were closed while reads hung: their memory is never given to anybody else."""


def _groups(pairs: Pairs) -> list[Pairs]:
    """Neighbours that fit into one slot together; a larger piece alone."""
    groups: list[Pairs] = []
    room = 0
    for pair in pairs:
        if not groups or pair[1].nbytes > room:
            groups.append([])
            room = SLOT_BYTES
        groups[-1].append(pair)
        room -= pair[1].nbytes
    return groups
