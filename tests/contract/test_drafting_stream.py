"""The Draft stream over real sockets: handshake, credit, reconnecting, faults that stay where they belong."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.interfaces import LinkState
from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2
from tandem_serve.rpc.convert_drafting import commands_request
from tandem_serve.rpc.convert_handshake import drafter_hello, primary_hello
from tandem_serve.rpc.drafting_client import DRAFT_METHOD, GrpcDrafterLink, LinkOptions
from tandem_serve.rpc.drafting_server import SERVICE, DraftingServer
from tandem_serve.types import (
    CreditGranted,
    DraftBlock,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    ExtendSequence,
    PrimaryInfo,
    credit_cost_bytes,
)
from tests.link_driver import Wake, events, ready
from tests.scripted_drafter import DRAFTER, PRIMARY, ScriptedDrafter, drafts, extended, opened

CONFIG = DrafterEngineConfig()
QUICK = LinkOptions(min_backoff_s=0.01, max_backoff_s=0.05)


@pytest.fixture
def drafter() -> ScriptedDrafter:
    return ScriptedDrafter()


@pytest.fixture
def serve() -> Iterator[Callable[..., DraftingServer]]:
    servers = []

    def start(drafter: ScriptedDrafter, config: DrafterEngineConfig = CONFIG, **options: Any) -> DraftingServer:
        server = DraftingServer(drafter, config, **options)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop(0)


@pytest.fixture
def connect() -> Iterator[Callable[..., tuple[GrpcDrafterLink, Wake]]]:
    links = []

    def start(
        address: str, primary: PrimaryInfo = PRIMARY, options: LinkOptions = QUICK
    ) -> tuple[GrpcDrafterLink, Wake]:
        wake = Wake()
        links.append(GrpcDrafterLink(address, primary, wake, options))
        return links[-1], wake

    yield start
    for link in links:
        link.close()


class RawStream:
    """A Draft stream that sends whatever bytes it is told to."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        call = self._channel.stream_stream(DRAFT_METHOD, response_deserializer=drafting_pb2.DraftResponse.FromString)
        self._call: Any = call(iter(self._out.get, None), timeout=20)

    def say(self, message: bytes | drafting_pb2.DraftRequest) -> None:
        self._out.put(message if isinstance(message, bytes) else message.SerializeToString())

    def hello(self, primary: PrimaryInfo = PRIMARY) -> drafting_pb2.DraftResponse:
        self.say(primary_hello(primary))
        return self.next()

    def next(self) -> drafting_pb2.DraftResponse:
        response: drafting_pb2.DraftResponse = next(self._call)
        return response

    def status(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end."""
        for _ in self._call_quietly():
            pass
        return self._call.code(), self._call.details()

    def _call_quietly(self) -> Iterator[drafting_pb2.DraftResponse]:
        try:
            yield from self._call
        except grpc.RpcError:
            return

    def close(self) -> None:
        self._out.put(None)
        self._channel.close()


@pytest.fixture
def raw() -> Iterator[Callable[[str], RawStream]]:
    streams: list[RawStream] = []

    def start(address: str) -> RawStream:
        streams.append(RawStream(address))
        return streams[-1]

    yield start
    for stream in streams:
        stream.close()


def commands(*items: DrafterCommand) -> drafting_pb2.DraftRequest:
    return commands_request(items, "bf16")


# ------------------------------------------------------------------ handshake


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer_hash": "other"}, ["tokenizer", "'other'", "'sha256:t'"]),
        ({"vocab_size": 99}, ["vocab_size", "99", "100"]),
        ({"fingerprint": "other"}, ["fingerprint", "'other'", "'sha256:p'"]),
        ({"hidden_size": 16}, ["hidden_size", "16", "8"]),
        ({"num_layers": 3}, ["taps", "3 layers", "[2, 4]"]),
    ],
)
def test_a_primary_that_does_not_fit_is_refused_naming_both_sides(
    change: dict[str, Any], named: list[str], drafter: ScriptedDrafter, serve: Any, connect: Any, caplog: Any
) -> None:
    link, wake = connect(serve(drafter).address, replace(PRIMARY, **change))
    wake.wait_until(lambda: link.state is LinkState.REFUSED)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert all(name in line for name in [*named, link.address])
    assert not drafter.peers


class LaxDrafter(ScriptedDrafter):
    """Takes any primary, so that the primary has to see for itself."""

    def check_primary(self, primary: PrimaryInfo) -> None:
        pass


def test_a_primary_refuses_a_drafter_that_does_not_fit(serve: Any, connect: Any, caplog: Any) -> None:
    link, wake = connect(serve(LaxDrafter(replace(DRAFTER, primary_fingerprint="other"))).address)
    wake.wait_until(lambda: link.state is LinkState.REFUSED)
    assert "'other'" in caplog.text


def test_the_right_drafter_may_take_the_wrong_one_s_place(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    wrong = serve(ScriptedDrafter(replace(DRAFTER, primary_fingerprint="other")))
    link, wake = connect(wrong.address, options=replace(QUICK, refused_retry_s=0.05))
    wake.wait_until(lambda: link.state is LinkState.REFUSED)
    wrong.stop(0)
    serve(drafter, port=wrong.port)
    ready(link, wake)
    assert link.info == DRAFTER


def test_a_plain_drafter_fits_any_primary_with_its_tokenizer(serve: Any, connect: Any) -> None:
    plain = replace(DRAFTER, primary_fingerprint="", taps=(), primary_hidden_size=0)
    link, wake = connect(serve(ScriptedDrafter(plain)).address, replace(PRIMARY, fingerprint="any", hidden_size=4096))
    ready(link, wake)
    link.send([opened(), replace(extended(), representations=None)])
    (block,) = events(link, wake, 1)
    assert isinstance(block, DraftBlock)


def test_another_wire_version_is_refused_by_the_drafter(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    stream = raw(serve(drafter).address)
    hello = primary_hello(PRIMARY)
    hello.hello.wire_version = 2
    stream.say(hello)
    code, details = stream.status()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "wire version" in details and "1" in details and "2" in details


def test_another_wire_version_is_refused_by_the_primary(
    serve: Any, connect: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def hello_of_tomorrow(terms: Any) -> drafting_pb2.DraftResponse:
        message = drafter_hello(terms)
        message.hello.wire_version = 2
        return message

    monkeypatch.setattr("tandem_serve.rpc.drafting_server.drafter_hello", hello_of_tomorrow)
    link, wake = connect(serve(ScriptedDrafter()).address)
    wake.wait_until(lambda: link.state is LinkState.REFUSED)
    assert "wire version" in caplog.text


@pytest.mark.parametrize(
    ("first", "complaint"),
    [
        (commands(opened()), "first message"),
        (drafting_pb2.DraftRequest(), "first message"),
        (b"\xff\xff\xff", "not a tandem.v1.DraftRequest"),
        (primary_hello(replace(PRIMARY, fingerprint="")), "hello.primary.fingerprint"),
        (primary_hello(replace(PRIMARY, vocab_size=0)), "hello.primary.vocab_size"),
        (primary_hello(replace(PRIMARY, model="m" * 600)), "hello.primary.model"),
    ],
)
def test_a_stream_that_does_not_start_with_a_proper_hello_ends(
    first: Any, complaint: str, drafter: ScriptedDrafter, serve: Any, raw: Any
) -> None:
    stream = raw(serve(drafter).address)
    stream.say(first)
    code, details = stream.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in details


def test_a_stream_that_never_says_hello_gives_its_place_back(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    code, _ = raw(serve(drafter, hello_timeout_s=0.05).address).status()
    assert code is grpc.StatusCode.CANCELLED


def test_a_stream_that_has_said_hello_may_be_silent(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    address = serve(drafter, hello_timeout_s=1.0).address
    stream = raw(address)
    stream.hello()
    raw(address).status()  # longer than the timeout
    stream.say(commands(opened(), extended()))
    assert len(stream.next().events.blocks) == 1


# ------------------------------------------------------------------ what is carried


@pytest.mark.parametrize("dtype", ["bf16", "f32", "int8"])
def test_representations_arrive_as_they_were_sent(
    dtype: Any, drafter: ScriptedDrafter, serve: Any, connect: Any
) -> None:
    link, wake = connect(serve(drafter, DrafterEngineConfig(representation_dtype=dtype)).address)
    ready(link, wake)
    sent = extended()
    link.send([opened(), sent])
    (block,) = events(link, wake, 1)
    assert block == DraftBlock("a", 1, 1, drafts(10, 4), 0.001)
    got_open, got = drafter.received
    assert got_open == opened()
    assert isinstance(got, ExtendSequence) and got.representations is not None and sent.representations is not None
    assert replace(got, representations=None) == replace(sent, representations=None)
    if dtype == "int8":
        half_a_scale = sent.representations.abs().amax(-1, keepdim=True) / 127 / 2 + 1e-6
        assert ((got.representations - sent.representations).abs() <= half_a_scale).all()
    else:
        assert torch.equal(got.representations.float(), sent.representations)


def test_a_message_beyond_the_drafters_limit_goes_in_parts(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    wide = replace(DRAFTER, taps=(4,), primary_hidden_size=1 << 16)
    drafter.info = wide
    link, wake = connect(
        serve(drafter, DrafterEngineConfig(max_message_bytes=16 << 20)).address, replace(PRIMARY, hidden_size=1 << 16)
    )
    ready(link, wake)
    names = [f"s{i}" for i in range(5)]  # 5 x 40 positions x 128 KiB
    link.send([opened(name) for name in names] + [extended(name, token_ids=(1,) * 40, drafter=wide) for name in names])
    found = events(link, wake, len(names))
    assert [event.sequence_id for event in found if isinstance(event, DraftBlock)] == names
    assert link.epoch == 1


def test_two_primaries_may_use_the_same_ids(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    address = serve(drafter).address
    links = [connect(address), connect(address)]
    for number, (link, wake) in enumerate(links):
        ready(link, wake)
        link.send([opened(), extended(round_=number, next_token_id=20 * number)])
    for number, (link, wake) in enumerate(links):
        assert events(link, wake, 1) == [DraftBlock("a", 1, number, drafts(20 * number, 4), 0.001)]


def test_closing_a_link_lets_the_drafter_forget_it(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    link, wake = connect(serve(drafter).address)
    ready(link, wake)
    drafter.wait_until(lambda: len(drafter.peers) == 1)
    link.close()
    drafter.wait_until(lambda: not drafter.peers)


# ------------------------------------------------------------------ credit


def test_a_slow_drafter_is_sent_no_more_than_its_credit(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    drafter.paused = True
    link, wake = connect(serve(drafter, DrafterEngineConfig(credit_bytes=1 << 16)).address)
    ready(link, wake)
    extend = extended(token_ids=(1,) * 50, next_token_id=None)
    cost, sent = credit_cost_bytes(extend), 0
    while link.credit_bytes() >= cost:
        link.send([replace(extend, start_position=50 * sent)])
        sent += 1
        assert link.credit_bytes() == (1 << 16) - sent * cost
    assert sent == (1 << 16) // cost
    link.send([extend])  # beyond the credit: dropped here, not there
    drafter.wait_until(lambda: len(drafter.received) == sent)
    drafter.resume()
    wake.wait_until(lambda: link.credit_bytes() == 1 << 16)
    assert len(drafter.received) == sent
    assert link.epoch == 1


def test_a_primary_that_overdraws_is_cut_off(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    drafter.paused = True
    stream = raw(serve(drafter, DrafterEngineConfig(credit_bytes=1 << 16)).address)
    stream.hello()
    for start in range(0, 2000, 50):
        stream.say(commands(extended(start_position=start, token_ids=(1,) * 50)))
    code, details = stream.status()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "credit" in details


def test_no_drafter_grants_more_credit_than_it_started_with(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    link, wake = connect(serve(drafter).address)
    ready(link, wake)
    drafter.wait_until(lambda: bool(drafter.peers))
    (peer,) = drafter.peers.values()
    peer.deliver([CreditGranted(1 << 50), DraftBlock("a", 1, 1, (1,))])
    events(link, wake, 1)
    assert link.credit_bytes() == CONFIG.credit_bytes


def test_a_command_too_long_for_the_drafter_costs_no_credit(
    drafter: ScriptedDrafter, serve: Any, connect: Any, caplog: Any
) -> None:
    drafter.paused = True
    drafter.info = wide = replace(DRAFTER, taps=(4,), primary_hidden_size=1 << 16)
    link, wake = connect(
        serve(drafter, DrafterEngineConfig(max_message_bytes=16 << 20)).address, replace(PRIMARY, hidden_size=1 << 16)
    )
    ready(link, wake)
    link.send([opened(), extended(token_ids=(1,) * 129, drafter=wide)])
    assert link.credit_bytes() == CONFIG.credit_bytes - credit_cost_bytes(opened())
    assert "dropped" in caplog.text


def test_credit_spent_on_malformed_commands_comes_back(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    stream = raw(serve(drafter).address)
    stream.hello()
    good, bad = extended(), replace(extended(), token_ids=(1, 2, 1_000))
    stream.say(commands(opened(), bad, good))
    wanted, granted = sum(map(credit_cost_bytes, [opened(), bad, good])), 0
    while granted < wanted:
        granted += stream.next().events.credit_granted_bytes
    assert granted == wanted


# ------------------------------------------------------------------ faults


WITHOUT_KEEPING = drafting_pb2.StoppingRule(policy=drafting_pb2.BLOCK_POLICY_ENTROPY, keep_threshold=-1)


def faulty_extends() -> list[tuple[str, drafting_pb2.DraftRequest]]:
    """Each wrong in one field, which is named."""

    def broken(
        field: str, change: Callable[[drafting_pb2.ExtendSequence], object]
    ) -> tuple[str, drafting_pb2.DraftRequest]:
        message = commands(extended())
        change(message.commands.commands[0].extend)
        return field, message

    return [
        broken("token_ids", lambda m: m.token_ids.append(100)),
        broken("next_token_id", lambda m: setattr(m, "next_token_id", 100)),
        broken("block_length", lambda m: setattr(m, "block_length", 65)),
        broken("stopping.policy", lambda m: setattr(m.stopping, "keep_threshold", 0.5)),
        broken("stopping.threshold", lambda m: m.stopping.MergeFrom(drafting_pb2.StoppingRule(policy=2, threshold=2))),
        broken("stopping.keep_threshold", lambda m: m.stopping.MergeFrom(WITHOUT_KEEPING)),
        broken("stopping.step_cost", lambda m: m.stopping.MergeFrom(drafting_pb2.StoppingRule(policy=2, step_cost=2))),
        broken("num_unverified", lambda m: setattr(m, "num_unverified", 1 << 31)),
        broken("start_position", lambda m: setattr(m, "start_position", (1 << 31) - 1)),
        broken("representations", lambda m: m.ClearField("representations")),
        broken("representations", lambda m: m.ClearField("token_ids")),
        broken("representations.shape", lambda m: m.representations.shape.append(1)),
        broken("representations.shape", lambda m: m.token_ids.append(1)),
        broken("representations.dtype", lambda m: setattr(m.representations, "dtype", 3)),
        broken("representations.dtype", lambda m: setattr(m.representations, "dtype", 77)),
        broken("representations.data", lambda m: setattr(m.representations, "data", b"123")),
        broken("representations", lambda m: setattr(m.representations, "data", b"\xff\x7f" * 48)),  # NaN
    ]


@pytest.mark.parametrize(("field", "message"), faulty_extends())
def test_a_malformed_command_costs_its_sequence_alone(
    field: str, message: drafting_pb2.DraftRequest, drafter: ScriptedDrafter, serve: Any, raw: Any
) -> None:
    stream = raw(serve(drafter).address)
    stream.hello()
    both = commands(opened("a"), opened("b"))
    both.commands.commands.extend([*message.commands.commands, *commands(extended("b")).commands.commands])
    stream.say(both)
    rejections: list[Any] = []
    blocks: list[Any] = []
    while not (rejections and blocks):
        answer = stream.next().events
        rejections.extend(answer.rejections)
        blocks.extend(answer.blocks)
    assert [(r.sequence_id, r.incarnation, r.retryable) for r in rejections] == [("a", 1, False)]
    assert f"commands[2].extend.{field}" in rejections[0].message
    assert [block.sequence_id for block in blocks] == ["b"]
    stream.say(commands(extended("a")))  # its drafter knows it no more
    assert stream.next().events.rejections[0].sequence_id == "a"


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", 101.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.0),
    ],
)
def test_sampling_out_of_range_rejects_the_sequence(
    parameter: str, value: float, drafter: ScriptedDrafter, serve: Any, raw: Any
) -> None:
    stream = raw(serve(drafter).address)
    stream.hello()
    message = commands(opened())
    setattr(message.commands.commands[0].open.sampling, parameter, value)
    stream.say(message)
    (rejection,) = stream.next().events.rejections
    assert f"sampling.{parameter}" in rejection.message


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"\x0a\xff", "not a tandem.v1.DraftRequest"),
        (primary_hello(PRIMARY), "after the hello"),
        (drafting_pb2.DraftRequest(), "after the hello"),
        (drafting_pb2.DraftRequest(commands={"commands": [{}]}), "commands[0] is of no known kind"),
        (commands(opened("")), "commands[0].open.sequence_id must not be empty"),
        (commands(opened("x" * 129)), "commands[0].open.sequence_id is longer"),
        (commands(*[opened()] * 4097), "number of commands"),
    ],
)
def test_a_malformed_message_ends_its_stream_alone(
    message: Any, complaint: str, drafter: ScriptedDrafter, serve: Any, raw: Any, connect: Any
) -> None:
    address = serve(drafter).address
    link, wake = connect(address)
    ready(link, wake)
    link.send([opened()])
    stream = raw(address)
    stream.hello()
    stream.say(message)
    code, details = stream.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in details
    link.send([extended()])
    assert len(events(link, wake, 1)) == 1
    assert link.epoch == 1


def test_a_message_too_long_ends_its_stream(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    stream = raw(serve(drafter, DrafterEngineConfig(max_message_bytes=16 << 20)).address)
    stream.hello()
    stream.say(b"\0" * (17 << 20))
    assert stream.status()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_engine_that_fails_ends_the_stream_and_says_no_more_than_that(serve: Any, raw: Any, caplog: Any) -> None:
    class Failing(ScriptedDrafter):
        def submit(self, peer_id: str, commands: Sequence[DrafterCommand]) -> None:
            raise RuntimeError("secret")

    stream = raw(serve(Failing()).address)
    stream.hello()
    stream.say(commands(opened()))
    code, details = stream.status()
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    "nonsense", [DraftBlock("a", 1, 1, (1_000,)), DraftBlock("a", 1, 1, (1,) * 65)], ids=["unknown token", "too long"]
)
def test_a_primary_hangs_up_on_a_drafter_that_talks_nonsense(
    nonsense: DraftBlock, drafter: ScriptedDrafter, serve: Any, connect: Any, caplog: Any
) -> None:
    link, wake = connect(serve(drafter).address)
    ready(link, wake)
    drafter.wait_until(lambda: bool(drafter.peers))
    (peer,) = drafter.peers.values()
    peer.deliver([nonsense])
    ready(link, wake, epoch=2)  # it may have come to its senses
    assert "draft_token_ids" in caplog.text
    assert link.receive() == []


def test_a_primary_that_does_not_read_is_cut_off(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    stream = raw(serve(drafter).address)
    stream.hello()
    drafter.wait_until(lambda: bool(drafter.peers))
    (peer,) = drafter.peers.values()
    many: list[DraftEvent] = [DraftBlock("a", 1, 1, (1,) * 64)] * 1024
    for _ in range(100):
        peer.deliver(many)
    drafter.wait_until(lambda: not drafter.peers)


# ------------------------------------------------------------------ coming and going


def test_a_link_reconnects_to_a_drafter_that_starts_again(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    server = serve(drafter)
    link, wake = connect(server.address)
    ready(link, wake)
    link.send([opened(), extended()])
    wake.wait_until(lambda: link.credit_bytes() == CONFIG.credit_bytes)  # the block has come, and is left lying
    server.stop(0)
    wake.wait_until(lambda: link.state is LinkState.CONNECTING)
    assert link.credit_bytes() == 0
    link.send([opened()])  # dropped
    again: DrafterInfo = replace(DRAFTER, fingerprint="sha256:another")
    other = ScriptedDrafter(again)
    serve(other, port=server.port)
    ready(link, wake, epoch=2)
    assert link.info == again
    assert link.receive() == []  # what the first drafter said is void
    link.send([extended()])
    (rejected,) = events(link, wake, 1)
    assert not isinstance(rejected, DraftBlock)
    assert [type(command) for command in other.received] == [ExtendSequence]


def test_a_drafter_that_accepts_and_then_fails_is_tried_ever_less_often(serve: Any, connect: Any) -> None:
    class Babbling(ScriptedDrafter):
        def connect(self, peer_id: str, deliver: Callable[[list[DraftEvent]], None]) -> None:
            super().connect(peer_id, deliver)
            deliver([DraftBlock("a", 1, 1, (1_000,))])

    address = serve(Babbling()).address
    began = time.monotonic()
    link, wake = connect(address, options=LinkOptions(min_backoff_s=0.02, max_backoff_s=1.0))
    wake.wait_until(lambda: link.epoch >= 6)
    assert time.monotonic() - began >= (0.02 + 0.04 + 0.08 + 0.16 + 0.32) / 2


def test_a_drafter_may_come_later_than_its_primary(drafter: ScriptedDrafter, serve: Any, connect: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    link, wake = connect(f"127.0.0.1:{port}")
    assert link.state is LinkState.CONNECTING
    assert link.info is None
    serve(drafter, port=port)
    ready(link, wake)


def test_a_link_gives_up_on_whoever_never_answers(
    drafter: ScriptedDrafter, serve: Any, connect: Any, caplog: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        link, wake = connect(f"127.0.0.1:{port}", options=replace(QUICK, handshake_timeout_s=0.1))
        held = [silent.accept()[0] for _ in range(3)]  # it tries again and again
    for connection in held:
        connection.close()
    serve(drafter, port=port)
    ready(link, wake)
    assert "no answer to the hello within 0.1 s" in caplog.text


def test_a_drafter_that_is_killed_is_noticed_at_once(connect: Any) -> None:
    script = """
        import sys
        from tandem_serve.config import DrafterEngineConfig
        from tandem_serve.rpc.drafting_server import DraftingServer
        from tests.scripted_drafter import ScriptedDrafter
        server = DraftingServer(ScriptedDrafter(), DrafterEngineConfig())
        server.start()
        print(server.address, flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        link, wake = connect(process.stdout.readline().strip())
        ready(link, wake)
        process.kill()
        wake.wait_until(lambda: link.state is LinkState.CONNECTING, timeout_s=5)


def test_stopping_ends_the_streams_and_the_health(drafter: ScriptedDrafter, serve: Any, raw: Any) -> None:
    server = serve(drafter)
    stream = raw(server.address)
    stream.hello()
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        assert check(request, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
    server.stop(1)
    code, details = stream.status()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in details
    drafter.wait_until(lambda: not drafter.peers)


def test_a_taken_port_is_an_error(drafter: ScriptedDrafter, serve: Any) -> None:
    port = serve(drafter).port
    with pytest.raises(OSError, match=str(port)):
        DraftingServer(drafter, CONFIG, port=port)
