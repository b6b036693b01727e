"""How streams between processes are made: the settings of every gRPC channel and server, and the numbers of messages, so that one that is lost, repeated or overtaken ends the stream. Opens nothing; knows no message's meaning.

There is no checksum beside the number: the bytes are TCP's to keep, and TLS's where it is used, and one over the parsed
message would not survive a field that the reader does not know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from workers.errors import StreamDamaged

MAX_MESSAGE_BYTES = 64 << 20
"""A full dump of a prefix cache has 8 bytes a block; a prompt at most 5 bytes a token."""

Options = tuple[tuple[str, int], ...]

_EVERY_CHANNEL: Options = (
    # A proxy in the environment is for the outside world; workers name each other by address.
    ("grpc.enable_http_proxy", 0),
)
_MESSAGES: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

ROUTER_CHANNEL: Options = (
    *_EVERY_CHANNEL,
    *_MESSAGES,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)
"""From a router to a worker. A subchannel pool of its own lets a new connection skip the back-off of the one that just broke.

No HTTP/2 keepalive: workers speak about once a second, so silence is noticed without pings (RouterConfig.worker_stale_s).
"""

HANDOFF_CHANNEL: Options = (
    *_EVERY_CHANNEL,
    *_MESSAGES,
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
"""From a worker to another, for the control streams of handoffs."""


def kv_stream_channel(max_message_bytes: int) -> Options:
    """From a worker to another, for KV bytes; the sender's address is that of its control streams, the connection is not."""
    return (
        *_EVERY_CHANNEL,
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.http2.lookahead_bytes", 8 << 20),
        ("grpc.use_local_subchannel_pool", 1),
    )


SERVER: Options = (
    *_MESSAGES,
    ("grpc.so_reuseport", 0),
    # A router or worker whose host vanished sends no reset; its requests must not run on for nobody.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
)


M = TypeVar("M")


class Sealer:
    """The writing end of a stream. `number` is that of the last message."""

    def __init__(self) -> None:
        self.number = 0

    def seal(self, message: M) -> M:
        """Gives a protobuf message (with the field number) its number."""
        sealed: Any = message
        self.number += 1
        sealed.number = self.number
        return message


class Unsealer:
    """The reading end. `number` is that of the last message."""

    def __init__(self) -> None:
        self.number = 0

    def check(self, message: Any) -> None:
        """Raises StreamDamaged. None stands for a message that could not be parsed."""
        if message is None:
            raise StreamDamaged(f"message {self.number + 1} of a stream cannot be read")
        if message.number != self.number + 1:
            raise StreamDamaged(f"message {message.number} of a stream came after message {self.number}")
        self.number = message.number


async def verified(messages: AsyncIterator[M], unsealer: Unsealer | None = None) -> AsyncIterator[M]:
    """The messages of a stream; raises StreamDamaged at the first that is not the next one that was written."""
    unsealer = unsealer or Unsealer()
    try:
        async for message in messages:
            unsealer.check(message)
            yield message
    except DecodeError as error:
        raise StreamDamaged(f"message {unsealer.number + 1} of a stream cannot be read") from error
