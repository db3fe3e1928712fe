"""Who may call a gRPC server: the `authorization` of a call's metadata, checked before anything else of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import grpc

from tandem_serve.errors import Unauthenticated
from tandem_serve.rpc.statuses import abort_with

CheckAuthorization: TypeAlias = Callable[[str | None], None]  # raises Unauthenticated

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)


def authorization_of(metadata: Iterable[Any] | None) -> str | None:
    """The value of `authorization`; None where there is none. Metadata keys are lower-case."""
    return next((str(value) for key, value in metadata or () if key == "authorization"), None)


class RequireAuthorization(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in grpc-stubs alone
    """Ends every call that `check` refuses with UNAUTHENTICATED, reflection included; health is open to all."""

    def __init__(self, check: CheckAuthorization) -> None:
        self._check = check

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if not handler_call_details.method.startswith(_OPEN_SERVICES):
            try:
                self._check(authorization_of(handler_call_details.invocation_metadata))
            except Unauthenticated as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: Unauthenticated) -> grpc.RpcMethodHandler[Any, Any]:
    """Streams both ways, whatever the method is: so it answers without waiting for a message."""

    async def refuse(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        await abort_with(context, error)
        yield b""  # makes this a stream

    return grpc.stream_stream_rpc_method_handler(refuse)
