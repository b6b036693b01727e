"""gRPC channels to other workers, one a target, made when first needed and bounded in number."""

from __future__ import annotations

from collections import OrderedDict

import grpc

from workers.pb import worker_pb2_grpc

MAX_MESSAGE_BYTES = 64 << 20
MAX_CHANNELS = 256

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # A router or worker whose host vanished sends no reset; its requests must not run on for nobody.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
)


class Peers:
    """Least recently used channels are closed beyond MAX_CHANNELS. Used from one event loop."""

    def __init__(self) -> None:
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()

    async def stub(self, target: str) -> worker_pb2_grpc.WorkerStub:
        """A stub for host:port; connecting happens with the first call."""
        channel = self._channels.get(target)
        if channel is None:
            channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            self._channels[target] = channel
            if len(self._channels) > MAX_CHANNELS:
                _, oldest = self._channels.popitem(last=False)
                await oldest.close()
        self._channels.move_to_end(target)
        return worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]

    async def forget(self, target: str) -> None:
        """Closes the channel to a peer that broke, so that its successor is dialled afresh."""
        channel = self._channels.pop(target, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
