"""The parts of a chaos trial that need no cluster: the bad network, and a client that resumes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tandem_serve.serving.chaos.client import Delivery, Order, ResumingClient, longest_gap_s
from tandem_serve.serving.chaos.network import FAIR, BadLink, Weather
from tandem_serve.serving.http_server import HttpServer


async def test_the_network_delays_stalls_cuts_and_mends() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = await asyncio.to_thread(BadLink, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    host, _, port = link.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def said(text: bytes) -> bytes:
        writer.write(text)
        return await asyncio.wait_for(reader.read(100), 10)

    assert await said(b"a") == b"a"
    link.set_weather(Weather(delay_s=0.1))
    started = asyncio.get_running_loop().time()
    assert await said(b"b") == b"b"
    assert asyncio.get_running_loop().time() - started >= 0.1
    link.set_weather(Weather(is_stalled=True))
    waiting = asyncio.ensure_future(said(b"c"))
    await asyncio.wait([waiting], timeout=0.2)
    assert not waiting.done()
    link.set_weather(FAIR)
    assert await waiting == b"c"
    link.set_weather(Weather(is_cut=True))
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(100), 10) == b""
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError):
        assert await said(b"nobody listens") == b""
    link.set_weather(Weather(is_stalled=True), seconds=0.1)  # and then fair
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await said(b"d") == b"d"
    writer.close()
    server.close()


def chunk_of(token_id: int) -> dict[str, object]:
    choice = {"index": 0, "text": "x", "finish_reason": None, "logprobs": None, "token_ids": [token_id]}
    return {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}


class Moody:
    """An endpoint whose streams break off. The token at a position is the position."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        turn = len(self.bodies)
        if turn == 1:
            return JSONResponse({"error": {"message": "full"}}, 429, headers={"retry-after": "0"})
        if turn == 2:
            return JSONResponse({"error": {"message": "no primary"}}, 503)
        return StreamingResponse(self._events(body, turn), media_type="text/event-stream")

    async def _events(self, body: dict[str, list[int]], turn: int) -> AsyncIterator[str]:
        start = len(body["prompt"])
        for count, position in enumerate(range(start, start + body["max_tokens"])):  # type: ignore[operator]
            if turn == 3 and count == 3:
                yield f"data: {json.dumps({'error': {'message': 'the primaries are gone'}})}\n\n"
                return
            if turn == 4 and count == 2:
                raise ConnectionResetError("the router dies")
            yield f"data: {json.dumps(chunk_of(position))}\n\n"
        yield "data: [DONE]\n\n"


async def test_the_client_goes_on_with_the_token_that_was_due() -> None:
    moody, app = Moody(), FastAPI()
    app.post("/v1/completions")(moody.complete)
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    client = ResumingClient(f"http://127.0.0.1:{server.port}")
    delivery = await client.complete(Order((0, 1, 2), 8, 0.5, seed=7))
    await client.close()
    await server.stop(1.0)
    assert delivery.token_ids == list(range(3, 11))
    assert (delivery.is_accepted, delivery.num_resumptions, delivery.num_refusals) == (True, 2, 1)
    assert [len(body["prompt"]) for body in moody.bodies] == [3, 3, 3, 6, 8]  # type: ignore[arg-type]
    assert [body["max_tokens"] for body in moody.bodies] == [8, 8, 8, 5, 3]
    assert {body["seed"] for body in moody.bodies} == {7}


async def test_a_pause_goes_from_token_to_token_whatever_breaks_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_serve.serving.chaos.client._GAP_S", 0.0)

    async def complete(request: Request) -> Response:
        body = await request.json()
        return StreamingResponse(events(len(body["prompt"])), media_type="text/event-stream")

    async def events(position: int) -> AsyncIterator[str]:
        if position == 3:
            yield f"data: {json.dumps(chunk_of(position))}\n\n"
            raise ConnectionResetError("the router dies")
        yield f"data: {json.dumps(chunk_of(position))}\n\n"

    app = FastAPI()
    app.post("/v1/completions")(complete)
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    client = ResumingClient(f"http://127.0.0.1:{server.port}")
    delivery = await client.complete(Order((0, 1, 2), 2, 0.5, seed=7))
    await client.close()
    await server.stop(1.0)
    assert delivery.token_ids == [3, 4]
    assert delivery.num_resumptions == 1
    (_, first), (since, _) = delivery.gaps
    assert since == first


def test_the_longest_pause_is_that_of_any_stream_in_the_time_asked_for() -> None:
    deliveries = [Delivery(gaps=[(0.0, 1.0), (5.0, 9.0)]), Delivery(gaps=[(4.0, 6.0)])]
    assert longest_gap_s(deliveries, 0.5, 4.5) == 2.0
    assert longest_gap_s(deliveries, 5.5, 5.6) == 4.0
    assert longest_gap_s(deliveries, 2.0, 3.0) == 0.0
