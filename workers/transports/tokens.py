"""Which secret a sender gave to which receiver, and what it is called, so that whoever connects is known by it. Knows no transport."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from workers.status import WorkerAddress
from workers.transports.sealing import SECRET_BYTES

ID_BYTES = 16
MAX_TOKENS = 1024
"""Kept; the oldest goes first, and its owner has to ask for another offer."""

Peer = tuple[str, int]
"""(worker id, generation)."""


def peer_of(address: WorkerAddress) -> Peer:
    return address.worker_id, address.generation


@dataclass(frozen=True, slots=True)
class Token:
    """`id` may be said on any connection; `secret` travels on the control stream only, and is proven, never shown."""

    id: bytes
    secret: bytes


class Tokens:
    """One for each receiver and generation, the same one as long as it is kept. The control stream knows who the receiver is."""

    def __init__(self) -> None:
        self._by_peer: dict[Peer, Token] = {}
        self._peers: dict[bytes, tuple[Peer, Token]] = {}

    def give(self, target: WorkerAddress) -> Token:
        peer = peer_of(target)
        token = self._by_peer.get(peer)
        if token is None:
            token = Token(secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES))
            self._by_peer[peer], self._peers[token.id] = token, (peer, token)
            if len(self._by_peer) > MAX_TOKENS:
                self._drop(next(iter(self._by_peer)))
        return token

    def called(self, token_id: bytes) -> tuple[Peer, Token] | None:
        """Whose it is; whoever names it has still to prove the secret."""
        return self._peers.get(token_id)

    def forget(self, worker_id: str) -> None:
        for peer in [peer for peer in self._by_peer if peer[0] == worker_id]:
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        del self._peers[self._by_peer.pop(peer).id]
