"""What clients of an overloaded router see, over HTTP and gRPC: 429 or RESOURCE_EXHAUSTED, and time limits kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest

from tandem_serve.config import AdmissionConfig, RouterLimits
from tandem_serve.errors import DeadlineExceeded, Overloaded
from tandem_serve.rpc.inference_client import InferenceClient
from tandem_serve.rpc.inference_server import InferenceServer
from tandem_serve.serving.admission import Admission, AdmittedTextService
from tandem_serve.serving.metrics import RouterMetrics
from tandem_serve.serving.openai_api import FrontEnd, create_app
from tandem_serve.serving.router import ClusterOverview
from tandem_serve.types import TextRequest
from tests.checkpoints import make_tokenizer
from tests.scripted_text import ScriptedText

REQUEST = TextRequest("r", "demo", "def", max_tokens=3)
BODY = {"model": "demo", "prompt": "def", "max_tokens": 3}


class Full:
    """A service with one seat, and one place in the queue for each of two clients. Nobody ends before `gate` is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.text = ScriptedText(gate=self.gate)
        config = AdmissionConfig(max_running_per_primary=1, max_queued=2, max_queued_per_client=1)
        self.admission = Admission(lambda: config, lambda: 1)
        self.service = AdmittedTextService(self.text, self.admission)

    async def reach(self, num_running: int, num_queued: int) -> None:
        async with asyncio.timeout(20):
            while (self.text.num_running, self.admission.num_queued) != (num_running, num_queued):  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def grpc_address(full: Full) -> AsyncIterator[str]:
    server = InferenceServer(full.service)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0)


def complete(address: str, request: TextRequest = REQUEST) -> Awaitable[str]:
    def run() -> str:
        with InferenceClient(address) as client:
            return "".join(delta.text for delta in client.complete(request))

    return asyncio.to_thread(run)


async def test_a_grpc_client_is_told_when_to_come_back_and_a_waiting_one_gets_its_text() -> None:
    full = Full()
    async with grpc_address(full) as address:
        running = asyncio.ensure_future(complete(address))
        await full.reach(1, 0)
        waiting = asyncio.ensure_future(complete(address))
        await full.reach(1, 1)
        with pytest.raises(Overloaded) as refused:
            await complete(address)
        assert refused.value.retry_after_s >= 1
        full.gate.set()
        assert await running == await waiting == "a b c "
    assert len(full.text.requests) == 2  # the one refused was never begun


async def test_a_grpc_deadline_ends_the_request_where_it_runs_and_where_it_waits() -> None:
    full = Full()
    async with grpc_address(full) as address:
        with pytest.raises(DeadlineExceeded):
            await complete(address, replace(REQUEST, timeout_s=0.2))
        await full.reach(0, 0)
        running = asyncio.ensure_future(complete(address))
        await full.reach(1, 0)
        with pytest.raises(DeadlineExceeded):
            await complete(address, replace(REQUEST, timeout_s=0.2))
        await full.reach(1, 0)
        full.gate.set()
        assert await running == "a b c "
    assert len(full.text.requests) == 2  # the one that waited was never begun
    assert full.admission.num_running == 0


async def test_grpc_clients_are_told_apart_by_their_credentials() -> None:
    full = Full()
    async with grpc_address(full) as address, grpc.aio.insecure_channel(address) as channel:
        generate: Any = channel.unary_stream("/tandem.v1.InferenceService/Generate")
        calls = [generate(b"\x12\x01a", metadata=(("authorization", key),)) for key in ("Bearer a", "Bearer b")]
        first = [asyncio.ensure_future(call.read()) for call in calls]
        await full.reach(1, 1)
        assert full.text.requests[0].client in ("Bearer a", "Bearer b")
        for call in calls:
            call.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        await full.reach(0, 0)


@asynccontextmanager
async def http_client(full: Full) -> AsyncIterator[httpx.AsyncClient]:
    tokenizer = make_tokenizer()

    async def overview() -> ClusterOverview:
        return ClusterOverview((), ())

    front = FrontEnd(full.service, tokenizer, None, "demo", RouterLimits, RouterMetrics(), overview, tuple)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(front)), base_url="http://test") as client:
        yield client


async def test_an_http_client_is_told_when_to_come_back_and_others_still_get_in() -> None:
    full = Full()

    def post(key: str) -> asyncio.Task[httpx.Response]:
        headers = {"authorization": f"Bearer {key}"}
        return asyncio.create_task(client.post("/v1/completions", json=BODY, headers=headers))

    async with http_client(full) as client:
        greedy = [post("greedy")]
        await full.reach(1, 0)
        greedy.append(post("greedy"))
        await full.reach(1, 1)
        refused = await post("greedy")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        modest = post("modest")
        await full.reach(1, 2)
        full.gate.set()
        answers = await asyncio.gather(*greedy, modest)
    assert [answer.status_code for answer in answers] == [200] * 3


async def test_a_timeout_in_the_body_is_answered_with_504() -> None:
    full = Full()
    async with http_client(full) as client:
        answer = await client.post("/v1/completions", json={**BODY, "timeout": 0.05})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert (await client.post("/v1/completions", json={**BODY, "timeout": 0})).status_code == 400
    assert full.text.num_running == full.admission.num_running == 0
