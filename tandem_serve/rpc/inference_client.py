"""A synchronous client of the public InferenceService, for the command line."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import grpc

from tandem_serve.rpc._gen.tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_serve.rpc.convert_inference import generate_request, parse_generate_response, parse_list_models_response
from tandem_serve.rpc.listening import channel_options
from tandem_serve.rpc.statuses import error_from
from tandem_serve.types import ModelCard, TextDelta, TextRequest


class InferenceClient:
    """Text completions from a router at host:port. Raises what the router itself would; does not retry.

    Args:
        address: host:port.
        application: the Ray Serve application to reach; a router without Ray needs none.
        api_key: where the router wants one.
    """

    def __init__(self, address: str, *, application: str = "", api_key: str | None = None) -> None:
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        metadata = {"application": application, "authorization": api_key and f"Bearer {api_key}"}
        self._metadata = tuple((key, value) for key, value in metadata.items() if value)

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def models(self, *, timeout_s: float = 10.0) -> list[ModelCard]:
        try:
            request = inference_pb2.ListModelsRequest()
            message = self._stub.ListModels(request, metadata=self._metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_from(error.code(), error.details(), error.trailing_metadata()) from error
        return parse_list_models_response(message)

    def complete(self, request: TextRequest) -> Iterator[TextDelta]:
        """Streams a request's completions, interleaved. Closing the generator cancels them; so does timeout_s."""
        call = self._stub.Generate(generate_request(request), metadata=self._metadata, timeout=request.timeout_s)
        try:
            for message in call:
                yield parse_generate_response(message)
        except grpc.RpcError as error:
            raise error_from(error.code(), error.details(), error.trailing_metadata()) from error
        finally:
            call.cancel()
