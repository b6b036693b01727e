"""The sender's end of a gRPC stream that breaks while it is written to: whatever gRPC raises, a transfer has failed and nothing else."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from transport_ends import HOST, TIMEOUT_S, End, whole_blocks

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout
from workers.transports.grpc_stream import _Link

BOUND_S = 3 * TIMEOUT_S
BIG = KvLayout(96, 8, 2, 64, 128, "float32", 4)
"""A pool of 96 MiB: more than gRPC buffers for a receiver that does not read."""
ERRORS = [
    grpc.RpcError("the call is over"), grpc.aio.UsageError("RPC already finished."), grpc.aio.InternalError("a batch failed"),
    grpc.aio.AbortError("aborted"), asyncio.InvalidStateError("half closed"), TimeoutError(),
]  # fmt: skip
"""Of gRPC's own two families, and what asyncio adds. UsageError is no RpcError."""


class EndedCall:
    """gRPC's side of a call that is over."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.num_writes = 0

    async def write(self, message: bytes) -> None:
        self.num_writes += 1
        raise self.error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_whatever_a_write_raises_the_pieces_are_lost_and_the_stream_is_not_written_to_again(
    error: Exception,
) -> None:
    source = await End.start("grpc", "prefill-0")
    call = EndedCall(error)
    link = _Link(call, TIMEOUT_S)  # type: ignore[arg-type]
    pieces = source.outgoing(whole_blocks([1, 2]))
    with pytest.raises(TransferFailed, match=type(error).__name__):
        await link.send("t", pieces)
    with pytest.raises(TransferFailed, match="ended its stream"):
        await link.send("t", pieces)
    assert call.num_writes == 1 and link.over.is_set()
    await source.stop()


@pytest.mark.timeout(240)
async def test_a_receiver_that_hangs_up_in_the_middle_of_a_write_fails_the_transfer_and_leaves_no_link() -> None:
    source, target = await End.start("grpc", "prefill-0", layout=BIG), await End.start("grpc", "decode-0", layout=BIG)
    source.fill(1)
    offer = source.transport.offer(target.address, HOST)
    assert offer is not None
    token = bytes.fromhex(json.loads(offer)["token"])
    async with grpc.aio.insecure_channel(source.address.target) as connection:
        call = connection.unary_stream("/baton.KvStream/Receive")(token)
        assert await asyncio.wait_for(call.read(), BOUND_S) == token[::-1]
        pieces = source.outgoing(whole_blocks(range(96), BIG))
        sending = asyncio.create_task(source.transport.send(target.address, "t", pieces))
        await asyncio.sleep(0)  # its first write is under way; it cannot end, since nobody reads
        assert not sending.done()
        call.cancel()
        with pytest.raises(TransferFailed):
            await asyncio.wait_for(sending, BOUND_S)
    with pytest.raises(TransferFailed):
        await source.transport.send(target.address, "t", pieces)
    await target.stop()
    await source.stop()
