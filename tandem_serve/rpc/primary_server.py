"""The token-level PrimaryService over any interfaces.Primary, for processes without Ray."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc

from tandem_serve.errors import PermissionDenied
from tandem_serve.interfaces import Directable, Primary
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import control_pb2
from tandem_serve.rpc.convert_costs import direct_drafting_response, parse_direct_drafting_request
from tandem_serve.rpc.convert_primary import (
    generate_tokens_response,
    parse_generate_tokens_request,
    primary_status_response,
)
from tandem_serve.rpc.listening import AioServer
from tandem_serve.rpc.statuses import abort_with
from tandem_serve.rpc.tls import ROUTER, PeerTls, require_client

SERVICE = control_pb2.DESCRIPTOR.services_by_name["PrimaryService"].full_name
MAX_MESSAGE_BYTES = 32 << 20  # a prompt of some millions of ids

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class PrimaryServer(AioServer):
    """Serves one primary on the running event loop. A cancelled call closes the primary's stream, which aborts it."""

    def __init__(self, primary: Primary, *, host: str = "127.0.0.1", port: int = 0, tls: PeerTls | None = None) -> None:
        """Binds the port (0: any free one); serves after start(). Needs a running loop. Raises OSError."""
        self._primary = primary
        self._has_tls = tls is not None
        self._vocab_size = 0  # known from start() on
        handlers = {
            "GenerateTokens": grpc.unary_stream_rpc_method_handler(
                self._generate,
                request_deserializer=None,
                response_serializer=control_pb2.GenerateTokensResponse.SerializeToString,
            ),
            "GetPrimaryStatus": grpc.unary_unary_rpc_method_handler(
                self._status,
                request_deserializer=None,
                response_serializer=control_pb2.GetPrimaryStatusResponse.SerializeToString,
            ),
            "DirectDrafting": grpc.unary_unary_rpc_method_handler(
                self._direct,
                request_deserializer=None,
                response_serializer=control_pb2.DirectDraftingResponse.SerializeToString,
            ),
        }
        super().__init__(SERVICE, handlers, max_message_bytes=MAX_MESSAGE_BYTES, host=host, port=port, tls=tls)

    async def start(self) -> None:
        self._vocab_size = (await self._primary.info()).vocab_size
        await super().start()

    async def _generate(
        self, data: bytes, context: Context
    ) -> AsyncGenerator[control_pb2.GenerateTokensResponse, None]:
        try:
            self._require_router(context)
            message = fields.parse(control_pb2.GenerateTokensRequest, data)
            request = parse_generate_tokens_request(message, self._vocab_size)
            request = replace(request, timeout_s=context.time_remaining())  # of the call's own deadline
            async with aclosing(self._primary.generate(request)) as steps:
                async for step in steps:
                    yield generate_tokens_response(step)
        except Exception as error:
            await abort_with(context, error)

    async def _status(self, data: bytes, context: Context) -> control_pb2.GetPrimaryStatusResponse:
        try:
            self._require_router(context)
            fields.parse(control_pb2.GetPrimaryStatusRequest, data)
            return primary_status_response(await self._primary.info(), await self._primary.status())
        except Exception as error:
            await abort_with(context, error)

    async def _direct(self, data: bytes, context: Context) -> control_pb2.DirectDraftingResponse:
        try:
            self._require_router(context)
            lengths = parse_direct_drafting_request(fields.parse(control_pb2.DirectDraftingRequest, data))
            primary = self._primary
            costs = await primary.direct(lengths) if isinstance(primary, Directable) else None
            return direct_drafting_response(costs)
        except Exception as error:
            await abort_with(context, error)

    def _require_router(self, context: Context) -> None:
        if not self._has_tls:
            return
        try:
            require_client(context, ROUTER)
        except PermissionDenied as error:
            logger.warning("%s turned away: %s", context.peer(), error)
            raise
