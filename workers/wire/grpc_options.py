"""Settings of every gRPC channel and server that workers and their routers open, in one place; opens nothing."""

from __future__ import annotations

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
