"""KV over the worker's own gRPC port: a stream of bounded messages for each receiver, without protobuf. The way that always works."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import numpy as np

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout
from workers.status import WorkerAddress
from workers.transports.channels import Channels, SenderLinks
from workers.transports.contract import OutgoingPiece, View
from workers.transports.offers import ID_BYTES, Tokens, decode, decode_hex, encode, peer_of
from workers.transports.push import HEADER_BYTES, Frame, Inboxes, PushInbox, pack, transfer_key, unpack
from workers.trust import parties
from workers.trust.channels import open_channel
from workers.trust.credentials import Credentials
from workers.trust.gate import may_be
from workers.wire.streams import kv_stream_channel

CHUNK_BYTES = 1 << 20
"""Bytes of a piece in one message: gRPC moves larger ones more slowly."""
_SERVICE, _METHOD = "baton.KvStream", "Receive"
_CONNECT_S = 10.0
_ids = itertools.count()


class _Link:
    """The sender's end of one receiver's stream; its handler runs as long as `over` is not set."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes], timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self.turn = asyncio.Lock()
        self.over = asyncio.Event()

    @property
    def is_sending(self) -> bool:
        return self.turn.locked()

    def stop(self) -> None:
        self.over.set()

    async def send(self, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        key = transfer_key(transfer_id)
        for piece in pieces:
            view, total = piece.view.data, piece.view.nbytes
            for offset in range(0, max(total, 1), CHUNK_BYTES):
                chunk = view[offset : offset + CHUNK_BYTES]
                async with self.turn:
                    await self._write(pack(Frame(key, piece.piece, offset, chunk.nbytes, total)), chunk)

    async def _write(self, header: bytes, chunk: memoryview) -> None:
        if self.over.is_set():
            raise TransferFailed("the receiver has ended its stream")
        try:
            await asyncio.wait_for(self._context.write(b"".join((header, chunk))), self._timeout_s)
        except Exception as error:  # grpc.aio raises several kinds, some of them undocumented
            self.over.set()
            raise TransferFailed(f"the stream to the receiver broke: {error!r}") from error


class GrpcChannel:
    """The receiver's end: reads one sender's stream on the event loop."""

    def __init__(self, source: WorkerAddress, offer: bytes, timeout_s: float, credentials: Credentials | None) -> None:
        self.source, self.offer = source, offer
        self.inboxes = Inboxes(self._abort, timeout_s)
        options = (*kv_stream_channel(CHUNK_BYTES + HEADER_BYTES), ("baton.kv_stream", next(_ids)))
        self._connection = open_channel(source.target, options, credentials, parties.worker(source.worker_id))
        self._reading: asyncio.Task[None] | None = None

    async def open(self, token: bytes) -> None:
        """Raises TransferFailed unless the sender has taken the token."""
        receive = self._connection.unary_stream(f"/{_SERVICE}/{_METHOD}")
        call = receive(token)
        try:
            first = await asyncio.wait_for(call.read(), _CONNECT_S)
        except BaseException as error:  # also when the dial is given up
            call.cancel()
            await self._connection.close()
            if isinstance(error, grpc.RpcError | TimeoutError):
                raise TransferFailed(f"no grpc stream from {self.source.worker_id}: {error!r}") from error
            raise
        if first is grpc.aio.EOF or first != token[::-1]:
            call.cancel()
            await self._connection.close()
            raise TransferFailed(f"{self.source.worker_id} does not answer as a sender")
        self._reading = asyncio.create_task(self._read(call))

    @property
    def is_broken(self) -> bool:
        return self.inboxes.is_broken

    @property
    def is_idle(self) -> bool:
        return self.inboxes.is_idle

    def inbox(self, transfer_id: str, place: Callable[[int], View]) -> PushInbox:
        return self.inboxes.open(transfer_id, place)

    async def close(self) -> None:
        self._abort()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        await self._connection.close()

    def _abort(self) -> None:
        self.inboxes.give_up()
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self, call: grpc.aio.UnaryStreamCall[bytes, bytes]) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                frame = unpack(message)
                if len(message) != HEADER_BYTES + frame.length:
                    raise TransferFailed("a message has another length than it says")
                inbox = self.inboxes.find(frame.key)
                home = None if inbox is None else inbox.begin(frame)
                if inbox is not None and home is not None:
                    np.copyto(home, np.frombuffer(message, np.uint8, offset=HEADER_BYTES))
                    inbox.end(frame, is_good=True)
        except (grpc.RpcError, TransferFailed):
            pass  # whoever waits hears it from the inboxes
        finally:
            call.cancel()
            self.inboxes.give_up()


class GrpcTransport:
    """`handlers()` must be added to the server that the worker's `target` names before anything is offered."""

    name = "grpc"

    def __init__(
        self, timeout_s: float, links: SenderLinks[_Link] | None = None, credentials: Credentials | None = None
    ) -> None:
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._tokens = Tokens()
        self._links: SenderLinks[_Link] = links or SenderLinks()
        self._channels: Channels[GrpcChannel] = Channels()
        self._is_served = False
        self._is_closed = False

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """For `grpc.aio.Server.add_generic_rpc_handlers`. Messages are bytes as they are."""
        self._is_served = True
        method = grpc.unary_stream_rpc_method_handler(self._serve)
        return (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),)

    # ---- as the sender ----

    def offer(self, target: WorkerAddress, host: str) -> bytes | None:
        if self._is_closed or not self._is_served:
            return None
        return encode({"token": self._tokens.give(target).id.hex()})

    async def send(self, target: WorkerAddress, transfer_id: str, pieces: Sequence[OutgoingPiece]) -> None:
        link = self._links.use(peer_of(target))
        if link is None:
            raise TransferFailed(f"{target.worker_id} is not connected over grpc")
        await link.send(transfer_id, pieces)

    async def _serve(
        self, token: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes] | None:
        owner = None if self._is_closed else self._tokens.called(token)
        peer = owner and owner[0]
        if peer is None or not may_be(context, parties.Kind.WORKER, peer[0]):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no such token")
            return None
        try:
            self._links.make_room(peer)
        except TransferFailed as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        link = _Link(context, self._timeout_s)
        old = self._links.put(peer, link)
        if old is not None:
            old.stop()
        try:
            async with link.turn:  # the receiver may be sent to as soon as it has heard this
                await context.write(token[::-1])
            await link.over.wait()
        finally:
            link.stop()
            self._links.remove(peer, link)
        return None

    # ---- as the receiver ----

    async def connect(self, source: WorkerAddress, layout: KvLayout, offer: bytes) -> GrpcChannel:
        token = decode_hex(decode(offer, {"token": str})["token"], ID_BYTES)

        async def make() -> GrpcChannel:
            channel = GrpcChannel(source, offer, self._timeout_s, self._credentials)
            await channel.open(token)
            return channel

        return await self._channels.get(source, offer, make)

    # ---- both ----

    async def forget(self, worker_id: str) -> None:
        self._tokens.forget(worker_id)
        for peer, link in self._links:
            if peer[0] == worker_id:
                link.stop()
        await self._channels.forget(worker_id)

    async def close(self) -> None:
        self._is_closed = True
        for _, link in self._links:
            link.stop()
        await self._channels.close()
