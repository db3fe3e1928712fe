"""The public InferenceService over a TextService: as functions for Ray Serve's ingress, and as a server without Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from tandem_serve.errors import Unavailable
from tandem_serve.interfaces import TextService
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import inference_pb2
from tandem_serve.rpc.authorization import CheckAuthorization, RequireAuthorization
from tandem_serve.rpc.convert_inference import (
    generate_response,
    list_models_response,
    name_of_call,
    parse_generate_request,
    with_metadata,
)
from tandem_serve.rpc.listening import AioServer
from tandem_serve.rpc.statuses import REQUEST_ID_KEY, abort_with

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_MESSAGE_BYTES = 8 << 20

Context = grpc.aio.ServicerContext[Any, Any]


async def generate(
    service: TextService,
    message: inference_pb2.GenerateRequest,
    metadata: Iterable[Any],
    *,
    name: str,
    peer: str,
    timeout_s: float | None = None,
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    """The Generate method. Raises what the service raises (statuses.set_status puts it on a call).

    Args:
        metadata: the call's; `traceparent` is the client's trace.
        name: from name_call.
    """
    request = with_metadata(parse_generate_request(message), name, metadata)
    request = replace(request, client=client_of(metadata, peer), timeout_s=timeout_s)
    async with aclosing(service.complete(request)) as deltas:
        async for delta in deltas:
            yield generate_response(delta)


def name_call(context: Any) -> str:
    """Gives a call its name, the client's if it has one: in logs, and as `x-request-id` behind the answer."""
    name = name_of_call(context.invocation_metadata() or ())
    context.set_trailing_metadata([(REQUEST_ID_KEY, name)])
    return name


def client_of(metadata: Iterable[tuple[str, str | bytes]], peer: str) -> str:
    """Whose a call is: its credentials, or without any the address that it comes from ("ipv4:host:port")."""
    return str(dict(metadata).get("authorization", "")) or peer.rpartition(":")[0]


async def list_models(service: TextService) -> inference_pb2.ListModelsResponse:
    """The ListModels method."""
    return list_models_response(await service.models())


async def check(service: TextService, message: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
    """grpc.health.v1's Check method for Ray Serve's ingress, which has no health servicer of its own."""
    if message.service not in ("", SERVICE):
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
    try:
        await service.models()
    except Unavailable:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class InferenceServer(AioServer):
    """Serves a TextService on the running event loop. A cancelled call closes its stream, which aborts the request."""

    def __init__(
        self,
        service: TextService,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        check_authorization: CheckAuthorization | None = None,
    ) -> None:
        """Binds the port (0: any free one); serves after start(). Needs a running loop. Raises OSError."""
        self._service = service
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate,
                request_deserializer=None,
                response_serializer=inference_pb2.GenerateResponse.SerializeToString,
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self._list_models,
                request_deserializer=None,
                response_serializer=inference_pb2.ListModelsResponse.SerializeToString,
            ),
        }
        super().__init__(
            SERVICE,
            handlers,
            max_message_bytes=MAX_MESSAGE_BYTES,
            host=host,
            port=port,
            interceptors=[RequireAuthorization(check_authorization)] if check_authorization else [],
        )

    async def _generate(self, data: bytes, context: Context) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        try:
            name = name_call(context)
            message = fields.parse(inference_pb2.GenerateRequest, data)
            metadata, left = context.invocation_metadata() or (), context.time_remaining()
            responses = generate(self._service, message, metadata, name=name, peer=context.peer(), timeout_s=left)
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except Exception as error:
            await abort_with(context, error)

    async def _list_models(self, data: bytes, context: Context) -> inference_pb2.ListModelsResponse:
        try:
            name_call(context)
            fields.parse(inference_pb2.ListModelsRequest, data)
            return await list_models(self._service)
        except Exception as error:
            await abort_with(context, error)
