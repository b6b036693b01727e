"""Which secret a sender gave to which receiver, so that whoever connects is known by it. Knows no transport."""

from __future__ import annotations

import secrets

from workers.status import WorkerAddress

TOKEN_BYTES = 16
MAX_TOKENS = 1024
"""Secrets kept; the oldest goes first, and its owner has to ask for another offer."""

Peer = tuple[str, int]
"""(worker id, generation)."""


def peer_of(address: WorkerAddress) -> Peer:
    return address.worker_id, address.generation


class Tokens:
    """One secret for each receiver and generation, the same one as long as it is kept."""

    def __init__(self) -> None:
        self._by_peer: dict[Peer, bytes] = {}
        self._peers: dict[bytes, Peer] = {}

    def give(self, target: WorkerAddress) -> bytes:
        peer = peer_of(target)
        token = self._by_peer.get(peer)
        if token is None:
            token = secrets.token_bytes(TOKEN_BYTES)
            self._by_peer[peer], self._peers[token] = token, peer
            if len(self._by_peer) > MAX_TOKENS:
                self._drop(next(iter(self._by_peer)))
        return token

    def owner(self, token: bytes) -> Peer | None:
        return self._peers.get(token)

    def forget(self, worker_id: str) -> None:
        for peer in [peer for peer in self._by_peer if peer[0] == worker_id]:
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        del self._peers[self._by_peer.pop(peer)]
