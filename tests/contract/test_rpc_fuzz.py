"""Thousands of malformed messages: each gets an answer or a status, and a healthy stream beside them never notices."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2, inference_pb2
from tandem_serve.rpc.convert_drafting import commands_request
from tandem_serve.rpc.convert_handshake import primary_hello
from tandem_serve.rpc.convert_primary import generate_tokens_request
from tandem_serve.rpc.drafting_client import DRAFT_METHOD, GrpcDrafterLink
from tandem_serve.rpc.drafting_server import DraftingServer
from tandem_serve.rpc.inference_server import InferenceServer
from tandem_serve.rpc.primary_server import PrimaryServer
from tandem_serve.types import (
    CloseSequence,
    DraftBlock,
    DrafterCommand,
    GenerationRequest,
    PolicyName,
    SamplingParams,
    StoppingRule,
)
from tests.engines import make_drafter_engine, tiny_drafter, tiny_primary
from tests.link_driver import Wake, events, ready
from tests.mutations import mutated
from tests.scripted_drafter import extended, opened
from tests.scripted_text import ScriptedText
from tests.unit.scripted_primary import ScriptedPrimary

OURS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION}
NUM_EXAMPLES = 1000
pytestmark = pytest.mark.slow
many = settings(max_examples=NUM_EXAMPLES, suppress_health_check=list(HealthCheck), database=None)

PRIMARY = tiny_primary()[1]
DRAFTER = tiny_drafter()[1]
HELLO = primary_hello(PRIMARY)
COMMANDS = commands_request(
    [
        opened("a"),
        extended("a", drafter=DRAFTER),
        opened("b"),
        extended("b", next_token_id=None, drafter=DRAFTER),
        opened("c"),
        replace(extended("c", drafter=DRAFTER), stopping=StoppingRule(PolicyName.OPTIMAL, 0.5, 0.25)),
        CloseSequence("b", 1),
    ],
    "bf16",
)
PROBE: list[DrafterCommand] = [opened("probe"), extended("probe", drafter=DRAFTER)]
END_OF_PROBE = CloseSequence("probe", 1)
GENERATE = inference_pb2.GenerateRequest(
    model="demo", text="def", max_tokens=3, temperature=0.5, top_p=0.9, seed=1, n=2, stop=["x"], stop_token_ids=[5],
    logprobs=2, speculation=inference_pb2.Speculation(block_length=4, policy=2, threshold=0.5),
)  # fmt: skip
GENERATE_TOKENS = generate_tokens_request(
    GenerationRequest("r", (1, 2, 3), SamplingParams(seed=5), 3, (7,), 2, 4, policy=PolicyName.ROUTER, threshold=0.5)
)


class Tally:
    """How the malformed messages were answered; each kind of answer must occur."""

    def __init__(self) -> None:
        self.codes: Counter[grpc.StatusCode] = Counter()

    def add(self, code: grpc.StatusCode) -> None:
        assert code in OURS | {grpc.StatusCode.OK}, code
        self.codes[code] += 1

    def check(self) -> None:
        assert sum(self.codes.values()) >= NUM_EXAMPLES
        assert self.codes[grpc.StatusCode.INVALID_ARGUMENT] > NUM_EXAMPLES // 10
        assert self.codes[grpc.StatusCode.OK] > NUM_EXAMPLES // 10


# ------------------------------------------------------------------ Drafting


class Drafting:
    """A server, a healthy link to it, and a stream for whatever is malformed, opened again whenever it ends."""

    def __init__(self) -> None:
        self.engine = make_drafter_engine()
        self.engine.start()
        self.server = DraftingServer(self.engine, DrafterEngineConfig())
        self.server.start()
        self.wake = Wake()
        self.link = GrpcDrafterLink(self.server.address, PRIMARY, self.wake)
        ready(self.link, self.wake)
        self.tally = Tally()
        self._channel = grpc.insecure_channel(self.server.address)
        self._stream: tuple[SimpleQueue[bytes | None], Any] | None = None

    def try_hello(self, data: bytes) -> None:
        out, call = self._open(data)
        self.tally.add(self._outcome(call, lambda response: response.WhichOneof("kind") == "hello"))
        out.put(None)

    def try_commands(self, data: bytes) -> None:
        """The probe behind the malformed message is answered, unless the stream ends first."""
        if self._stream is None:
            self._stream = self._open(HELLO.SerializeToString())
            next(self._stream[1])
        out, call = self._stream
        out.put(data)
        out.put(commands_request(PROBE, "bf16").SerializeToString())
        code = self._outcome(call, lambda response: any(b.sequence_id == "probe" for b in response.events.blocks))
        if code is grpc.StatusCode.OK:
            out.put(commands_request([END_OF_PROBE], "bf16").SerializeToString())
        else:
            out.put(None)
            self._stream = None
        self.tally.add(code)

    def check_the_healthy_link(self) -> None:
        self.link.send(PROBE)
        (block,) = events(self.link, self.wake, 1)
        assert isinstance(block, DraftBlock)
        self.link.send([END_OF_PROBE])
        assert self.link.epoch == 1

    def close(self) -> None:
        if self._stream is not None:
            self._stream[0].put(None)
        self.link.close()
        self._channel.close()
        self.server.stop(0)
        self.engine.stop()

    def _open(self, first: bytes) -> tuple[SimpleQueue[bytes | None], Any]:
        out: SimpleQueue[bytes | None] = SimpleQueue()
        out.put(first)
        open_stream = self._channel.stream_stream(
            DRAFT_METHOD, response_deserializer=drafting_pb2.DraftResponse.FromString
        )
        return out, open_stream(iter(out.get, None), timeout=120)

    def _outcome(self, call: Any, wanted: Callable[[drafting_pb2.DraftResponse], bool]) -> grpc.StatusCode:
        try:
            for response in call:
                if wanted(response):
                    return grpc.StatusCode.OK
        except grpc.RpcError as error:
            return error.code()
        raise AssertionError("the stream ended without a status")


@pytest.fixture(scope="module")
def drafting() -> Iterator[Drafting]:
    drafting = Drafting()
    yield drafting
    drafting.close()


def test_malformed_drafting_commands(drafting: Drafting) -> None:
    @many
    @given(mutated(COMMANDS))
    def attack(data: bytes) -> None:
        drafting.try_commands(data)
        drafting.check_the_healthy_link()

    drafting.tally = Tally()
    attack()
    drafting.tally.check()


def test_malformed_drafting_hellos(drafting: Drafting) -> None:
    @settings(many, max_examples=300)
    @given(mutated(HELLO))
    def attack(data: bytes) -> None:
        drafting.try_hello(data)

    drafting.tally = Tally()
    attack()
    assert drafting.tally.codes.keys() == OURS - {grpc.StatusCode.RESOURCE_EXHAUSTED} | {grpc.StatusCode.OK}
    drafting.check_the_healthy_link()


# ------------------------------------------------------------------ Inference and Primary


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """Both asyncio services on a loop of their own; the attackers are synchronous."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def start() -> tuple[InferenceServer, PrimaryServer]:
        servers = InferenceServer(ScriptedText()), PrimaryServer(ScriptedPrimary(range(9)))
        for server in servers:
            await server.start()
        return servers

    inference, primary = run(start())
    yield {"InferenceService/Generate": inference.address, "PrimaryService/GenerateTokens": primary.address}
    run(inference.stop(0))
    run(primary.stop(0))
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.mark.parametrize(
    ("method", "valid"), [("InferenceService/Generate", GENERATE), ("PrimaryService/GenerateTokens", GENERATE_TOKENS)]
)
def test_malformed_generation_requests(method: str, valid: Any, addresses: dict[str, str]) -> None:
    tally = Tally()
    with grpc.insecure_channel(addresses[method]) as channel:
        call: Any = channel.unary_stream(f"/tandem.v1.{method}")

        def responses(data: bytes) -> list[bytes]:
            return list(call(data, timeout=30))

        healthy = responses(valid.SerializeToString())
        assert healthy

        @many
        @given(mutated(valid))
        def attack(data: bytes) -> None:
            beside = call(valid.SerializeToString(), timeout=30)
            try:
                responses(data)
                tally.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                tally.add(error.code())
            assert list(beside) == healthy

        attack()
    tally.check()
