"""Writes and reads what a sender offers to a receiver: a small flat JSON object. Knows no transport."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from workers.errors import TransferFailed
from workers.status import WorkerAddress
from workers.transports.sealing import SECRET_BYTES

MAX_OFFER_BYTES = 16 << 10
"""NIXL's grow with the number of network devices, a few hundred bytes each."""

Value = int | str


def encode(offer: Mapping[str, Value]) -> bytes:
    return json.dumps(offer, separators=(",", ":")).encode()


def decode(offer: bytes, fields: Mapping[str, type[int] | type[str]]) -> dict[str, Value]:
    """The offer's fields, exactly those and of those types. Raises TransferFailed: it came from the network."""
    if len(offer) > MAX_OFFER_BYTES:
        raise TransferFailed(f"an offer of {len(offer)} bytes is too long")
    try:
        value = json.loads(offer)
    except (ValueError, RecursionError) as error:
        raise TransferFailed(f"an offer is not JSON: {error}") from error
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise TransferFailed("an offer has other fields than expected")
    for name, kind in fields.items():
        if type(value[name]) is not kind:
            raise TransferFailed(f"{name} of an offer is no {kind.__name__}")
    return value


def decode_hex(text: Value, num_bytes: int) -> bytes:
    """A token or nonce of exactly `num_bytes`. Raises TransferFailed."""
    try:
        token = bytes.fromhex(str(text))
    except ValueError as error:
        raise TransferFailed("a token of an offer is not hexadecimal") from error
    if len(token) != num_bytes:
        raise TransferFailed(f"a token of an offer has {len(token)} bytes, not {num_bytes}")
    return token


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
