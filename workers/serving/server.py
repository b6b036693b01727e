"""A worker's gRPC face: streams of routers and peers, and what operators ask. Translates; decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.serving.driver import WorkerDriver
from workers.status import Identity, Role
from workers.trust.gate import may_be
from workers.trust.parties import Kind
from workers.wire.attach_protobuf import status_to_pb


class WorkerServer(worker_pb2_grpc.WorkerServicer):
    """Every method is called on the driver's event loop."""

    def __init__(self, driver: WorkerDriver, identity: Identity) -> None:
        self._driver = driver
        self._identity = identity

    async def Attach(
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkerFrame]:
        messages = self._driver.streams.serve(request_iterator, context)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    async def Handoff(
        self, request_iterator: AsyncIterator[pb.HandoffDown], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.HandoffUp]:
        messages = self._driver.serving.serve(
            request_iterator, lambda worker_id: may_be(context, Kind.WORKER, worker_id)
        )
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    async def SetRole(self, request: pb.SetRoleRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        try:
            role = Role(request.role)
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no role is called {request.role!r}")
        await self._require_generation(request.generation, context)
        return status_to_pb(self._driver.set_role(role))

    async def SetDraining(self, request: pb.SetDrainingRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        await self._require_generation(request.generation, context)
        return status_to_pb(self._driver.set_draining(request.is_draining))

    async def _require_generation(self, generation: int, context: grpc.aio.ServicerContext) -> None:
        """0 stands for whichever it is."""
        me = self._identity
        if generation not in (0, me.generation):
            text = f"{me.worker_id} is in generation {me.generation}, not {generation}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        return status_to_pb(self._driver.status())
