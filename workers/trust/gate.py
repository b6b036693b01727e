"""The gate in front of a worker's gRPC server: it lets a call through when the rules allow it to the caller's certificate. Decides nothing itself."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from workers.trust.parties import Kind, Party, parties_called
from workers.trust.rules import may_call

log = logging.getLogger(__name__)


def callers(context: grpc.aio.ServicerContext) -> frozenset[Party]:
    """The parties of the caller's certificate, which the handshake has verified; none where there are no certificates."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return parties_called(name.decode("ascii", "replace") for name in names)


def may_be(context: grpc.aio.ServicerContext, kind: Kind, claimed_id: str) -> bool:
    """Whether the caller may be who it says: its certificate names that party, or there are no certificates."""
    is_certified = "x509_pem_cert" in context.auth_context()
    return not is_certified or any((party.kind, party.id) == (kind, claimed_id) for party in callers(context))


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses with PERMISSION_DENIED what the rules do not allow, before the method sees anything of it."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                guarded = _guarded_stream if inspect.isasyncgenfunction(behaviour) else _guarded_call
                return handler._replace(**{kind: guarded(method, behaviour)})
        return None


async def _require(method: str, context: grpc.aio.ServicerContext) -> None:
    parties = callers(context)
    if not may_call(method, parties):
        who = ", ".join(sorted(party.dns_name for party in parties)) or "a certificate that names no party"
        log.warning("%s was refused to %s at %s", method, who, context.peer())
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the certificate does not allow this call")


def _guarded_call(method: str, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await _require(method, context)
        return await behaviour(request, context)

    return guarded


def _guarded_stream(method: str, behaviour: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await _require(method, context)
        async with aclosing(behaviour(request, context)) as messages:
            async for message in messages:
                yield message

    return guarded
