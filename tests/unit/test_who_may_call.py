"""Who may call what: every method of a real worker, by everybody who could stand at its port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest
from builders import FakeModel
from certificates import credentials, folder, foreign_pair
from running_workers import CONFIG

from workers.pb import worker_pb2 as pb
from workers.status import Role, WorkerAddress
from workers.trust.parties import ADMIN, OBSERVER, Party, router, worker
from workers.trust.rules import CALLERS
from workers.wire.attach import RouterHello
from workers.wire.attach_protobuf import router_message_to_pb
from workers.wire.streams import ROUTER_CHANNEL, Sealer
from workers.worker import Worker

REFUSED = {
    "nobody": set(CALLERS),
    "no certificate": set(CALLERS),
    "a stranger's authority": set(CALLERS),
    "a name of no party": set(CALLERS),
    "worker": {"Attach", "SetRole", "SetDraining"},
    "router": {"Handoff", "SetRole", "SetDraining", "Receive"},
    "observer": {"Attach", "Handoff", "SetRole", "SetDraining", "Receive"},
    "admin": {"Attach", "Handoff", "Receive"},
    "router that administers": {"Handoff", "Receive"},
}
SERVICE = pb.DESCRIPTOR.services_by_name["Worker"]
METHODS: dict[str, tuple[bool, bool]] = {
    **{
        f"/{SERVICE.full_name}/{method.name}": (method.client_streaming, method.server_streaming)
        for method in SERVICE.methods
    },
    "/baton.KvStream/Receive": (False, True),
}
"""All that a worker's server serves: whether requests and answers are streams."""
HELD_DOWN = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
SELF = worker("decode-0")


def test_every_method_has_a_rule() -> None:
    assert set(CALLERS) == set(METHODS)


@pytest.fixture
async def served() -> AsyncIterator[WorkerAddress]:
    made = Worker(
        CONFIG, "decode-0", 1, Role.MIXED, load=partial(FakeModel, num_blocks=8), credentials=credentials(SELF)
    )
    yield await made.start()
    await made.stop()


def channels(target: str) -> dict[str, grpc.aio.Channel]:
    def secure(own: grpc.ChannelCredentials) -> grpc.aio.Channel:
        named = (*ROUTER_CHANNEL, ("grpc.ssl_target_name_override", SELF.dns_name))
        return grpc.aio.secure_channel(target, own, options=named)

    def known(*parties: Party) -> grpc.aio.Channel:
        return secure(credentials(*parties).channel())

    ca = (folder() / "ca.crt").read_bytes()
    stranger = foreign_pair(router("router-0"), ADMIN, worker("decode-1"))
    return {
        "nobody": grpc.aio.insecure_channel(target, options=ROUTER_CHANNEL),
        "no certificate": secure(grpc.ssl_channel_credentials(ca)),
        "a stranger's authority": secure(grpc.ssl_channel_credentials(ca, stranger.key, stranger.cert)),
        "a name of no party": secure(_nameless()),
        "worker": known(worker("decode-1")),
        "router": known(router("router-1")),
        "observer": known(OBSERVER),
        "admin": known(ADMIN),
        "router that administers": known(router("router-0"), ADMIN),
    }


def _nameless() -> grpc.ChannelCredentials:
    """A certificate of the cluster's own authority that names somebody it does not know."""
    from cluster.identity.authority import Authority, Pair

    class Nobody(Party):
        @property
        def dns_name(self) -> str:
            return "localhost"

    ca, key = ((folder() / name).read_bytes() for name in ("ca.crt", "ca.key"))
    pair = Authority(Pair(ca, key)).issue((Nobody(ADMIN.kind),), 10)
    return grpc.ssl_channel_credentials(ca, pair.key, pair.cert)


async def outcome(channel: grpc.aio.Channel, method: str) -> grpc.StatusCode:
    """What the server says to a call with one empty message.

    Once in some thousands of calls a refusal arrives before the message is sent, and grpc.aio then reports that its own
    sending failed ("Internal error from Core") in the place of the status: the call is made again.
    """
    for _ in range(10):
        code, details = await _outcome(channel, method)
        if (code, details) != (grpc.StatusCode.INTERNAL, "Internal error from Core"):
            break
    return code


async def _outcome(channel: grpc.aio.Channel, method: str) -> tuple[grpc.StatusCode, str | None]:
    takes_many, gives_many = METHODS[method]
    make = getattr(channel, f"{'stream' if takes_many else 'unary'}_{'stream' if gives_many else 'unary'}")

    async def one() -> AsyncIterator[bytes]:
        yield b""

    call: Any = make(method)(one() if takes_many else b"", timeout=20)
    try:
        if gives_many:
            async for _ in call:
                break
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, None


async def test_who_may_call_what(served: WorkerAddress) -> None:
    refused: dict[str, set[str]] = {}
    for who, channel in channels(served.target).items():
        async with channel:
            found = {method: await outcome(channel, method) for method in METHODS}
        is_let_in = any(code not in HELD_DOWN for code in found.values())
        denied = {method for method, code in found.items() if code in HELD_DOWN}
        refused[who] = {method.rpartition("/")[2] for method in denied} if is_let_in else denied
    # A stream of KV asks for a token as well, and refuses in the same way: that workers may call it is in the table.
    refused["worker"].discard("Receive")
    assert refused == REFUSED


async def test_a_router_attaches_under_its_own_name_only(served: WorkerAddress) -> None:
    for hello, code in (("router-1", grpc.StatusCode.OK), ("router-0", grpc.StatusCode.PERMISSION_DENIED)):
        async with channels(served.target)["router"] as channel:
            message = Sealer().seal(router_message_to_pb(RouterHello(hello)))

            async def said(first: bytes = message.SerializeToString()) -> AsyncIterator[bytes]:
                yield first

            call = channel.stream_stream(f"/{SERVICE.full_name}/Attach")(said(), timeout=20)
            if code is grpc.StatusCode.OK:
                assert await call.read() is not grpc.aio.EOF
            else:
                assert await call.code() is code
