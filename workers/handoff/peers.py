"""gRPC channels to other workers, one a target, made when first needed and bounded in number."""

from __future__ import annotations

from collections import OrderedDict

import grpc

from workers.errors import TransferFailed
from workers.pb import worker_pb2_grpc
from workers.wire.grpc_options import HANDOFF_CHANNEL

MAX_CHANNELS = 256


class Peer:
    """A channel to one target and how many transfers use it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.channel = grpc.aio.insecure_channel(target, options=HANDOFF_CHANNEL)
        self.stub: worker_pb2_grpc.WorkerStub = worker_pb2_grpc.WorkerStub(self.channel)  # type: ignore[no-untyped-call]
        self.num_users = 0


class Peers:
    """Beyond `max_channels` the one that is not in use and was taken longest ago is closed. Used from one event loop."""

    def __init__(self, max_channels: int = MAX_CHANNELS) -> None:
        self._max_channels = max_channels
        self._peers: OrderedDict[str, Peer] = OrderedDict()

    async def take(self, target: str) -> Peer:
        """A channel to host:port, in use until it is given back; connecting happens with the first call.

        Raises TransferFailed when all channels are in use.
        """
        peer = self._peers.get(target)
        if peer is None:
            idle = None
            if len(self._peers) >= self._max_channels:
                idle = next((other for other in self._peers.values() if not other.num_users), None)
                if idle is None:
                    raise TransferFailed(f"{self._max_channels} senders are connected and in use")
                del self._peers[idle.target]
            peer = self._peers[target] = Peer(target)
            peer.num_users += 1
            if idle is not None:
                try:
                    await idle.channel.close()
                except BaseException:
                    self.give(peer)
                    raise
            return peer
        peer.num_users += 1
        self._peers.move_to_end(target)
        return peer

    def give(self, peer: Peer) -> None:
        """One transfer uses it less."""
        peer.num_users -= 1

    async def forget(self, target: str) -> None:
        """Closes the channel to a peer that broke, so that its successor is dialled afresh."""
        peer = self._peers.pop(target, None)
        if peer is not None:
            await peer.channel.close()

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.channel.close()
        self._peers.clear()
