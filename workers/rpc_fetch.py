"""KV over gRPC: the receiver fetches announced pieces from the sender's pool, one unary call a piece. Knows no session."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence

import grpc
import numpy as np

from workers.errors import TransferFailed
from workers.kv_transfer.memory import KvLayout, KvMemory
from workers.kv_transfer.transport import IncomingPiece, OutgoingPiece, View
from workers.peers import CHANNEL_OPTIONS
from workers.status import WorkerAddress

_SERVICE, _METHOD = "baton.workers.KvFetch", "Fetch"
TIMEOUT_S = 10.0


class RpcFetchTransport:
    """Pull over the worker's own gRPC server; a random token in the offer says who may read."""

    name = "grpc"

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._token = secrets.token_hex(16)
        self._channels: dict[str, _FetchChannel] = {}
        method = grpc.unary_unary_rpc_method_handler(self._fetch)
        self.handler = grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method})

    async def _fetch(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        token, block, first_layer, num_layers = json.loads(request)
        if not secrets.compare_digest(token, self._token):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this pool may not be read with that token")
        return self._memory.block(block, first_layer, num_layers).tobytes()

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        return self._token.encode()

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> _FetchChannel:
        key = f"{source.target} {offer.decode()}"
        if key not in self._channels:
            self._channels[key] = _FetchChannel(source, offer.decode())
        return self._channels[key]

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        """The receiver fetches; nothing to do here."""

    async def forget(self, worker_id: str) -> None:
        for key, channel in list(self._channels.items()):
            if channel.worker_id == worker_id:
                del self._channels[key]
                await channel.close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class _FetchChannel:
    def __init__(self, source: WorkerAddress, token: str) -> None:
        self.worker_id = source.worker_id
        self._token = token
        self._channel = grpc.aio.insecure_channel(source.target, options=CHANNEL_OPTIONS)
        self._call = self._channel.unary_unary(f"/{_SERVICE}/{_METHOD}")

    def inbox(self, transfer_id: str, place: Callable[[int], View]) -> _FetchInbox:
        return _FetchInbox(self, place)

    async def fetch(self, piece: IncomingPiece) -> bytes:
        """Raises TransferFailed."""
        request = json.dumps([self._token, piece.source_block, piece.first_layer, piece.num_layers]).encode()
        try:
            return bytes(await self._call(request, timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            raise TransferFailed("the sender's pool cannot be read over gRPC") from error

    async def close(self) -> None:
        await self._channel.close()


class _FetchInbox:
    def __init__(self, channel: _FetchChannel, place: Callable[[int], View]) -> None:
        self._channel = channel
        self._place = place
        self._is_closed = False

    async def collect(self, pieces: Sequence[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        arrived: list[int] = []
        lost: list[int] = []
        for piece in pieces:
            try:
                data = await self._channel.fetch(piece)
            except TransferFailed:
                lost.append(piece.piece)
                continue
            view = self._place(piece.piece)
            if self._is_closed or len(data) != view.nbytes:
                lost.append(piece.piece)
            else:
                np.copyto(view, np.frombuffer(data, np.uint8))
                arrived.append(piece.piece)
        return tuple(arrived), tuple(lost)

    def checksum(self, piece: int) -> int | None:
        return None

    async def close(self) -> None:
        self._is_closed = True
