"""gRPC channels to other workers, one a target, made when first needed and bounded in number."""

from __future__ import annotations

from collections import OrderedDict

from workers.errors import InvalidConfig, TransferFailed
from workers.pb import worker_pb2_grpc
from workers.status import WorkerAddress
from workers.trust import parties
from workers.trust.channels import open_channel
from workers.trust.credentials import Credentials
from workers.wire.grpc_options import HANDOFF_CHANNEL

MAX_CHANNELS = 256


class Peer:
    """A channel to one worker and how many transfers use it."""

    def __init__(self, key: tuple[str, str], credentials: Credentials | None) -> None:
        self.key = key
        worker_id, target = key
        try:
            self.channel = open_channel(target, HANDOFF_CHANNEL, credentials, parties.worker(worker_id))
        except InvalidConfig as error:
            raise TransferFailed(f"no worker has that id: {error}") from error
        self.stub: worker_pb2_grpc.WorkerStub = worker_pb2_grpc.WorkerStub(self.channel)  # type: ignore[no-untyped-call]
        self.num_users = 0


class Peers:
    """Beyond `max_channels` the one that is not in use and was taken longest ago is closed. Used from one event loop."""

    def __init__(self, credentials: Credentials | None = None, max_channels: int = MAX_CHANNELS) -> None:
        self._credentials = credentials
        self._max_channels = max_channels
        self._peers: OrderedDict[tuple[str, str], Peer] = OrderedDict()

    async def take(self, source: WorkerAddress) -> Peer:
        """A channel to that worker, in use until it is given back; connecting happens with the first call.

        Raises TransferFailed when all channels are in use, or no worker can have that id.
        """
        key = _key(source)
        peer = self._peers.get(key)
        if peer is None:
            idle = None
            if len(self._peers) >= self._max_channels:
                idle = next((other for other in self._peers.values() if not other.num_users), None)
                if idle is None:
                    raise TransferFailed(f"{self._max_channels} senders are connected and in use")
                del self._peers[idle.key]
            peer = self._peers[key] = Peer(key, self._credentials)
            peer.num_users += 1
            if idle is not None:
                try:
                    await idle.channel.close()
                except BaseException:
                    self.give(peer)
                    raise
            return peer
        peer.num_users += 1
        self._peers.move_to_end(key)
        return peer

    def give(self, peer: Peer) -> None:
        """One transfer uses it less."""
        peer.num_users -= 1

    async def forget(self, source: WorkerAddress) -> None:
        """Closes the channel to a peer that broke, so that its successor is dialled afresh."""
        peer = self._peers.pop(_key(source), None)
        if peer is not None:
            await peer.channel.close()

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.channel.close()
        self._peers.clear()


def _key(source: WorkerAddress) -> tuple[str, str]:
    return source.worker_id, source.target
