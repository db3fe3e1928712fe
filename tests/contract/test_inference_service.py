"""The public InferenceService on a real socket: our client, a client built by reflection, faults, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tandem_serve.errors import InvalidRequest, Overloaded, TandemError, Unavailable
from tandem_serve.rpc._gen.tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_serve.rpc.inference_client import InferenceClient
from tandem_serve.rpc.inference_server import SERVICE, InferenceServer
from tandem_serve.types import TextDelta, TextRequest
from tests.scripted_text import CARDS, ScriptedText

REQUEST = TextRequest("r", "demo", "def", max_tokens=3, n=2, seed=1, logprobs=0)
T = TypeVar("T")


@asynccontextmanager
async def served(service: ScriptedText) -> AsyncIterator[str]:
    server = InferenceServer(service)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0)


async def with_client(address: str, use: Callable[[InferenceClient], T]) -> T:
    """Runs the synchronous client beside the server's loop."""

    def run() -> T:
        with InferenceClient(address, application="text") as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_completions_are_those_of_the_service_itself() -> None:
    service = ScriptedText()
    direct = [delta async for delta in service.complete(REQUEST)]
    async with served(service) as address:
        assert await with_client(address, lambda client: list(client.complete(REQUEST))) == direct
        assert await with_client(address, InferenceClient.models) == CARDS
    first, second = service.requests
    assert second.client == "ipv4:127.0.0.1"
    assert replace(second, request_id=first.request_id, client="") == first


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("no such model", field="model"), Overloaded("full", retry_after_s=3.0), Unavailable("no primary")],
)
async def test_errors_arrive_as_what_they_are(error: TandemError) -> None:
    async with served(ScriptedText(error=error)) as address:
        for use in (lambda client: list(client.complete(REQUEST)), InferenceClient.models):
            with pytest.raises(type(error)) as caught:
                await with_client(address, use)
            assert str(caught.value) == str(error)
            assert vars(caught.value) == vars(error)


async def test_a_field_out_of_range_is_named_and_never_reaches_the_service() -> None:
    service = ScriptedText()
    async with served(service) as address:
        with pytest.raises(InvalidRequest) as caught:
            await with_client(address, lambda client: list(client.complete(replace(REQUEST, temperature=3.0))))
    assert caught.value.field == "temperature"
    assert service.requests == []


async def test_leaving_a_stream_cancels_it() -> None:
    service = ScriptedText(gate=asyncio.Event())

    def take_one(client: InferenceClient) -> TextDelta:
        deltas = client.complete(REQUEST)
        first = next(iter(deltas))
        deltas.close()  # type: ignore[attr-defined]
        return first

    async with served(service) as address:
        assert (await with_client(address, take_one)).text == "a "
        await asyncio.wait_for(service.idle.wait(), 10)
    assert service.num_running == 0


async def test_many_streams_at_once() -> None:
    async with served(ScriptedText()) as address:
        runs = [with_client(address, lambda client: list(client.complete(REQUEST))) for _ in range(8)]
        results = await asyncio.gather(*runs)
    assert all(result == results[0] for result in results)


async def test_a_client_can_be_built_by_reflection_alone() -> None:
    def use(address: str) -> tuple[list[str], str, list[str]]:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = descriptor_pool.DescriptorPool(database)  # knows nothing but what the server tells
            service = pool.FindServiceByName("tandem.v1.InferenceService")
            method = service.FindMethodByName("Generate")
            request_type, response_type = (
                message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type)
            )
            call: Any = channel.unary_stream(
                f"/{service.full_name}/{method.name}",
                request_serializer=request_type.SerializeToString,
                response_deserializer=response_type.FromString,
            )
            responses: list[Any] = list(call(request_type(text="def", max_tokens=3, temperature=0), timeout=10))
            names = [method.name for method in service.methods]
            return names, "".join(response.text for response in responses), sorted(database.get_services())

    async with served(ScriptedText()) as address:
        methods, text, services = await asyncio.to_thread(use, address)
    assert methods == ["Generate", "ListModels"]
    assert text == "a b c "
    assert services == ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", SERVICE]


async def test_health_says_whether_it_serves() -> None:
    async with served(ScriptedText()) as address, grpc.aio.insecure_channel(address) as channel:
        check: Any = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", SERVICE):
            answer = await check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_bytes_that_are_no_message_are_the_caller_s_fault() -> None:
    async with served(ScriptedText()) as address, grpc.aio.insecure_channel(address) as channel:
        for method in ("Generate", "ListModels"):
            call: Any = channel.unary_unary(f"/{SERVICE}/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("error", [None, Overloaded("full", retry_after_s=3.0)])
@pytest.mark.parametrize(
    ("given", "expected"), [("order-66", "order-66"), ("a b", "[0-9a-f]{32}"), ("", "[0-9a-f]{32}")]
)
async def test_an_answer_tells_the_request_s_name(error: TandemError | None, given: str, expected: str) -> None:
    service = ScriptedText(error=error)
    metadata = (("x-request-id", given),) if given else ()
    async with served(service) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        for call in (
            stub.Generate(inference_pb2.GenerateRequest(text="a"), metadata=metadata, timeout=10),
            stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=10),
        ):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while hasattr(call, "read") and await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() is (grpc.StatusCode.RESOURCE_EXHAUSTED if error else grpc.StatusCode.OK)
            trailing = dict(await call.trailing_metadata())
            assert re.fullmatch(expected, trailing["x-request-id"])
            assert trailing.get("retry-after") == ("3" if error else None)
            for request in service.requests:
                assert f"-{trailing['x-request-id']}-" in request.request_id
            service.requests.clear()


async def test_a_message_too_long_is_refused() -> None:
    async with served(ScriptedText()) as address, grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\0" * (9 << 20))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
