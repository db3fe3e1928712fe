"""A primary behind gRPC is the primary: same steps, same errors, same aborts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from tandem_serve.errors import InvalidRequest, ModelMismatch, Overloaded, TandemError, Unavailable
from tandem_serve.interfaces import Primary
from tandem_serve.rpc.primary_client import GrpcPrimary
from tandem_serve.rpc.primary_server import SERVICE, PrimaryServer
from tandem_serve.types import (
    BlockLengths,
    CostPoint,
    DrafterLoad,
    DraftingCosts,
    GenerationRequest,
    PrimaryStatus,
    SamplingParams,
)
from tests.unit.scripted_primary import INFO, ScriptedPrimary

REQUEST = GenerationRequest("r", (1, 2, 3), SamplingParams(seed=5), max_tokens=8, num_logprobs=2)


@asynccontextmanager
async def served(primary: Primary) -> AsyncIterator[GrpcPrimary]:
    server = PrimaryServer(primary)
    await server.start()
    client = GrpcPrimary(server.address)
    try:
        yield client
    finally:
        await client.close()
        await server.stop(0)


async def until(holds: Any, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 (the scripted primary only counts)
            await asyncio.sleep(0.001)


async def test_steps_are_those_of_the_primary_itself() -> None:
    primary = ScriptedPrimary(range(20), step_sizes=(3, 1))
    direct = [step async for step in primary.generate(REQUEST)]
    async with served(primary) as client:
        assert [step async for step in client.generate(REQUEST)] == direct
    assert primary.requests == [REQUEST, REQUEST]
    assert direct[-1].finish_reason is not None


LOADS = (DrafterLoad("a:1", 3, 0.25), DrafterLoad("b:1", 0, None))


async def test_info_and_status_are_those_of_the_primary_itself() -> None:
    async with served(ScriptedPrimary()) as client:
        assert await client.info() == INFO
        nothing = (DrafterLoad("drafter:1", 0, None),)
        assert await client.status() == PrimaryStatus(0, 0, 0.0, (("drafter:1", "ready"),), nothing)


async def test_loads_of_drafters_arrive_with_the_status() -> None:
    class Measuring(ScriptedPrimary):
        async def status(self) -> PrimaryStatus:
            links = (("a:1", "ready"), ("b:1", "connecting"))
            return PrimaryStatus(0, 0, 0.0, links, LOADS)

    async with served(Measuring()) as client:
        assert (await client.status()).loads == LOADS


class Directed(ScriptedPrimary):
    """Keeps what it is told, and answers with `costs`."""

    costs: DraftingCosts | None = None
    told: BlockLengths | None = None

    async def direct(self, lengths: BlockLengths | None) -> DraftingCosts | None:
        self.told = lengths
        return self.costs


async def test_block_lengths_arrive_and_costs_come_back() -> None:
    primary = Directed()
    async with served(primary) as client:
        assert await client.direct(BlockLengths((4, 0), (64, 1000))) is None
        assert primary.told == BlockLengths((4, 0), (64, 1000))
        point = CostPoint(3.5, 0.25, 17.0)
        primary.costs = DraftingCosts((point, point), (point,), (3.0, 2.0), (2.0, 0.5))
        assert await client.direct(None) == primary.costs
        primary.costs = replace(primary.costs, lengths=BlockLengths((3,), (64,)))
        assert await client.direct(BlockLengths((), ())) == primary.costs
        assert primary.told == BlockLengths((), ())
        assert await client.direct(None) == primary.costs
        assert primary.told is None
        with pytest.raises(InvalidRequest, match="by_batch"):
            await client.direct(BlockLengths((65,), (64,)))
        with pytest.raises(InvalidRequest, match="probe_every"):
            await client.direct(BlockLengths((4,), ()))
    async with served(ScriptedPrimary()) as client:  # one that nobody directs
        assert await client.direct(BlockLengths((4,), (64,))) is None


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("prompt is too long", field="prompt_token_ids"),
        Overloaded("the queue is full", retry_after_s=2.0),
        Unavailable("shutting down"),
        ModelMismatch("no"),
    ],
)
@pytest.mark.parametrize("after", [0, 3])
async def test_errors_arrive_as_what_they_are(error: TandemError, after: int) -> None:
    async with served(ScriptedPrimary(range(20), error=error, error_after=after)) as client:
        steps = []
        with pytest.raises(type(error)) as caught:
            async for step in client.generate(REQUEST):
                steps.append(step)
    assert sum(len(step.token_ids) for step in steps) == after
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


async def test_a_bug_in_the_primary_is_unavailable_to_the_caller() -> None:
    async with served(ScriptedPrimary(range(20), error=ValueError("secret"))) as client:
        with pytest.raises(Unavailable) as caught:
            await anext(client.generate(REQUEST))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("request_", [replace(REQUEST, prompt_token_ids=()), replace(REQUEST, prompt_token_ids=(288,))])
async def test_a_request_out_of_range_never_reaches_the_primary(request_: GenerationRequest) -> None:
    primary = ScriptedPrimary(range(20))
    async with served(primary) as client:
        with pytest.raises(InvalidRequest, match="prompt_token_ids"):
            await anext(client.generate(request_))
    assert primary.requests == []


async def test_closing_the_stream_aborts_the_request() -> None:
    primary = ScriptedPrimary(range(20), gate=asyncio.Event())
    async with served(primary) as client:
        steps = client.generate(REQUEST)
        await anext(steps)
        assert primary.num_running == 1
        await steps.aclose()
        await until(lambda: primary.num_running == 0)
    assert primary.num_closed_early == 1


async def test_cancelling_the_caller_aborts_the_request() -> None:
    primary = ScriptedPrimary(range(20), gate=asyncio.Event())
    async with served(primary) as client:

        async def consume() -> None:
            async for _ in client.generate(REQUEST):
                pass

        task = asyncio.create_task(consume())
        await until(lambda: primary.num_running == 1)
        task.cancel()
        await until(lambda: primary.num_running == 0)
    assert primary.num_closed_early == 1


async def test_a_primary_that_is_not_there_is_unavailable() -> None:
    async with served(ScriptedPrimary()) as client:
        address = client.address
    gone = GrpcPrimary(address)
    with pytest.raises(Unavailable):
        await gone.info()
    with pytest.raises(Unavailable):
        await anext(gone.generate(REQUEST))
    await gone.close()


async def test_bytes_that_are_no_message_are_the_caller_s_fault() -> None:
    async with served(ScriptedPrimary()) as client, grpc.aio.insecure_channel(client.address) as channel:
        for method in ("GetPrimaryStatus", "GenerateTokens"):
            call: Any = channel.unary_unary(f"/{SERVICE}/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
