"""interfaces.Primary at another process: a client of PrimaryService."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc

from tandem_serve.errors import Unavailable
from tandem_serve.rpc._gen.tandem.v1 import control_pb2, control_pb2_grpc
from tandem_serve.rpc.convert_costs import direct_drafting_request, parse_direct_drafting_response
from tandem_serve.rpc.convert_primary import (
    generate_tokens_request,
    parse_generate_tokens_response,
    parse_primary_status_response,
)
from tandem_serve.rpc.listening import channel_options
from tandem_serve.rpc.statuses import error_from
from tandem_serve.rpc.tls import PRIMARY, PeerTls, expect_server
from tandem_serve.types import (
    BlockLengths,
    DraftingCosts,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    PrimaryStatus,
)

STATUS_TIMEOUT_S = 5.0


class GrpcPrimary:
    """A primary at host:port. Raises what the primary itself would (rpc/statuses.py); does not retry.

    Made and used on one event loop.
    """

    def __init__(self, address: str, tls: PeerTls | None = None) -> None:
        self.address = address
        self._tls = tls
        self._certificates: object = None  # those of the channel
        self._channel = self._open_channel()

    def _open_channel(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.address, options=channel_options())
        self._certificates = self._tls.current()
        options = [*channel_options(), expect_server(PRIMARY)]
        return grpc.aio.secure_channel(self.address, self._tls.channel_credentials(), options=options)

    def _current_channel(self) -> grpc.aio.Channel:
        """A new one once the certificates have been renewed. A call holds on to its channel, which would close else."""
        if self._tls is not None and self._tls.current() is not self._certificates:
            self._channel = self._open_channel()
        return self._channel

    async def close(self) -> None:
        await self._channel.close(None)

    async def info(self) -> PrimaryInfo:
        return (await self._get_status())[0]

    async def status(self) -> PrimaryStatus:
        return (await self._get_status())[1]

    async def direct(self, lengths: BlockLengths | None) -> DraftingCosts | None:
        """See interfaces.Directable."""
        stub = control_pb2_grpc.PrimaryServiceStub(self._current_channel())
        try:
            message = await stub.DirectDrafting(direct_drafting_request(lengths), timeout=STATUS_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from(error.code(), error.details(), error.trailing_metadata()) from error
        return parse_direct_drafting_response(message)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """Streams the sequence; closing the generator cancels the call, which aborts the request over there."""
        stub = control_pb2_grpc.PrimaryServiceStub(self._current_channel())
        call = stub.GenerateTokens(generate_tokens_request(request), timeout=request.timeout_s)
        try:
            async for message in call:
                yield parse_generate_tokens_response(message, request.request_id)
        except grpc.aio.AioRpcError as error:
            raise error_from(error.code(), error.details(), error.trailing_metadata()) from error
        finally:
            call.cancel()

    async def _get_status(self) -> tuple[PrimaryInfo, PrimaryStatus]:
        try:
            request = control_pb2.GetPrimaryStatusRequest()
            channel = self._current_channel()
            message = await control_pb2_grpc.PrimaryServiceStub(channel).GetPrimaryStatus(
                request, timeout=STATUS_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # ours, not a client's
                raise Unavailable(f"{self.address} does not answer") from error
            raise error_from(error.code(), error.details(), error.trailing_metadata()) from error
        return parse_primary_status_response(message)
