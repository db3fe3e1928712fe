"""Mutual TLS between pools on real sockets: who is let in, who is not, and certificates that are replaced."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.errors import ConfigError, Unavailable
from tandem_serve.interfaces import LinkState
from tandem_serve.rpc.drafting_client import GrpcDrafterLink, LinkOptions
from tandem_serve.rpc.drafting_server import DraftingServer
from tandem_serve.rpc.primary_client import GrpcPrimary
from tandem_serve.rpc.primary_server import PrimaryServer
from tandem_serve.rpc.tls import DRAFTER, PeerTls, expect_server
from tandem_serve.types import DraftBlock, GenerationRequest, SamplingParams
from tests.certificates import Authority, folder_of, renew
from tests.link_driver import Wake, events, ready
from tests.scripted_drafter import PRIMARY, ScriptedDrafter, extended, opened
from tests.serving_contract import eventually
from tests.unit.scripted_primary import INFO, ScriptedPrimary

OPTIONS = LinkOptions(min_backoff_s=0.01, max_backoff_s=0.02)
REQUEST = GenerationRequest("r", (1, 2, 3), SamplingParams(seed=5), max_tokens=8)


@pytest.fixture(scope="module")
def ours() -> Authority:
    return Authority.new("ours")


@pytest.fixture(scope="module")
def theirs() -> Authority:
    return Authority.new("theirs")


@contextmanager
def drafter_behind(tls: PeerTls | None) -> Iterator[str]:
    server = DraftingServer(ScriptedDrafter(), DrafterEngineConfig(), tls=tls)
    server.start()
    try:
        yield server.address
    finally:
        server.stop(0)


@contextmanager
def linked(address: str, tls: PeerTls | None) -> Iterator[tuple[GrpcDrafterLink, Wake]]:
    wake = Wake()
    link = GrpcDrafterLink(address, PRIMARY, wake, OPTIONS, tls)
    try:
        yield link, wake
    finally:
        link.close()


def drafts_come(link: GrpcDrafterLink, wake: Wake, name: str) -> bool:
    link.send([opened(name), extended(name)])
    (block,) = events(link, wake, 1)
    return isinstance(block, DraftBlock) and block.sequence_id == name


def attempt(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """What a stranger's call is told: the least of methods, health."""
    options = [expect_server(DRAFTER), ("grpc.enable_retries", 0)]
    channel = (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
    )
    with channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def without_certificate(ours: Authority, theirs: Authority, folder: Path) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(ours.pem())


def of_another_authority(ours: Authority, theirs: Authority, folder: Path) -> grpc.ChannelCredentials:
    mine = folder_of(folder, "primary", theirs)
    key, certificate = (mine / "tls.key").read_bytes(), (mine / "tls.crt").read_bytes()
    return grpc.ssl_channel_credentials(ours.pem(), key, certificate)


def expired(ours: Authority, theirs: Authority, folder: Path) -> grpc.ChannelCredentials:
    return PeerTls(folder_of(folder, "primary", ours, days=-1)).channel_credentials()


def plain_text(ours: Authority, theirs: Authority, folder: Path) -> None:
    return None


Stranger = Callable[[Authority, Authority, Path], grpc.ChannelCredentials | None]


@pytest.mark.parametrize(
    ("stranger", "logged"),
    [
        (without_certificate, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (of_another_authority, "unable to get local issuer certificate"),
        (expired, "certificate has expired"),
        (plain_text, "WRONG_VERSION_NUMBER"),
    ],
)
def test_a_stranger_is_refused_with_a_reason_and_nobody_else_notices(
    stranger: Stranger,
    logged: str,
    ours: Authority,
    theirs: Authority,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with (
        drafter_behind(PeerTls(folder_of(tmp_path, "drafter", ours))) as address,
        linked(address, PeerTls(folder_of(tmp_path, "primary", ours))) as (link, wake),
    ):
        ready(link, wake)
        assert drafts_come(link, wake, "before")
        capfd.readouterr()
        assert attempt(address, stranger(ours, theirs, tmp_path)) is grpc.StatusCode.UNAVAILABLE
        assert logged in capfd.readouterr().err
        assert drafts_come(link, wake, "after")
        assert (link.state, link.epoch) == (LinkState.READY, 1)
        friend = PeerTls(folder_of(tmp_path, "router", ours)).channel_credentials()
        assert attempt(address, friend) is grpc.StatusCode.OK  # the refusals were not for some other reason


@pytest.mark.parametrize("role", ["router", "drafter"])
def test_a_drafter_drafts_for_primaries_alone(
    role: str, ours: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A drafter that was taken over has a certificate that is good for being a drafter, and for nothing else."""
    with drafter_behind(PeerTls(folder_of(tmp_path, "drafter", ours))) as address:
        with linked(address, PeerTls(folder_of(tmp_path, role, ours))) as (link, _):
            link_warned = f"drafter {address} not connected: PERMISSION_DENIED"
            eventually(lambda: link_warned in caplog.text, "the link says why")
            assert link.state is LinkState.CONNECTING
        assert f"turned away: this is for tandem-primary alone, the certificate is tandem-{role}'s" in caplog.text
        with linked(address, PeerTls(folder_of(tmp_path, "primary", ours))) as (link, wake):
            ready(link, wake)


@pytest.mark.parametrize("role", ["primary", "drafter"])
async def test_a_primary_serves_routers_alone(
    role: str, ours: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = PrimaryServer(ScriptedPrimary(range(20)), tls=PeerTls(folder_of(tmp_path, "primary", ours)))
    await server.start()
    stranger = GrpcPrimary(server.address, PeerTls(folder_of(tmp_path, role, ours)))
    router = GrpcPrimary(server.address, PeerTls(folder_of(tmp_path, "router", ours)))
    try:
        for call in (stranger.info(), stranger.status(), anext(stranger.generate(REQUEST))):
            with pytest.raises(Unavailable, match=f"for tandem-router alone, the certificate is tandem-{role}'s"):
                await call
        assert caplog.text.count("turned away") == 3
        assert await router.info() == INFO
    finally:
        await asyncio.gather(stranger.close(), router.close())
        await server.stop(0)


@pytest.mark.parametrize("impostor", ["another authority's", "a primary's", "plain text"])
def test_a_primary_tells_nothing_to_an_impostor(
    impostor: str, ours: Authority, theirs: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = {
        "another authority's": lambda: PeerTls(folder_of(tmp_path, "drafter", theirs)),
        "a primary's": lambda: PeerTls(folder_of(tmp_path, "primary", ours)),
        "plain text": lambda: None,
    }[impostor]()
    warned = threading.Event()
    caplog.handler.addFilter(lambda record: warned.set() or True)
    with (
        drafter_behind(tls) as address,
        linked(address, PeerTls(folder_of(tmp_path, "primary", ours))) as (link, _),
    ):
        assert warned.wait(10)
        assert link.state is LinkState.CONNECTING
        assert f"drafter {address} not connected" in caplog.text


def test_certificates_of_both_sides_and_the_authority_are_replaced_without_a_restart(
    ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    """The authority too, by way of a ca.crt that holds both. What is open stays open; what comes next uses the new."""
    served, mine = folder_of(tmp_path, "drafter", ours), folder_of(tmp_path, "primary", ours)
    client_tls = PeerTls(mine)
    with drafter_behind(PeerTls(served)) as address, linked(address, client_tls) as (old, old_wake):
        ready(old, old_wake)
        stranger = of_another_authority(ours, theirs, tmp_path)
        assert attempt(address, stranger) is grpc.StatusCode.UNAVAILABLE
        renew(served, "drafter", theirs, also_trusting=ours)
        renew(mine, "primary", theirs, also_trusting=ours)
        with linked(address, client_tls) as (new, new_wake):
            ready(new, new_wake)
            assert drafts_come(new, new_wake, "new")
        renew(served, "drafter", theirs)  # the old authority is gone for good
        assert attempt(address, PeerTls(mine).channel_credentials()) is grpc.StatusCode.OK
        assert attempt(address, PeerTls(folder_of(tmp_path, "primary", ours)).channel_credentials()) is (
            grpc.StatusCode.UNAVAILABLE
        )
        assert drafts_come(old, old_wake, "old")
        assert old.epoch == 1


def test_a_half_written_set_is_not_used(
    ours: Authority, theirs: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served, other = folder_of(tmp_path, "drafter", ours), folder_of(tmp_path, "drafter", theirs)
    friend = PeerTls(folder_of(tmp_path, "primary", ours)).channel_credentials()
    with drafter_behind(PeerTls(served)) as address:
        (served / "tls.key").write_bytes((other / "tls.key").read_bytes())
        assert attempt(address, friend) is grpc.StatusCode.OK
        assert "those read before stay in use" in caplog.text
        assert "BEGIN" not in caplog.text


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_files_are_checked_at_the_start(ours: Authority, tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = folder_of(tmp_path, "drafter", ours)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="TLS files in"):
        PeerTls(folder)


async def test_routers_and_primaries_without_ray_do_the_same(
    ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    """Also a stream that is open while certificates are replaced ends as if nothing had been."""
    served, mine = folder_of(tmp_path, "primary", ours), folder_of(tmp_path, "router", ours)
    server = PrimaryServer(ScriptedPrimary(range(20)), tls=PeerTls(served))
    await server.start()
    client = GrpcPrimary(server.address, PeerTls(mine))
    stranger = GrpcPrimary(server.address, PeerTls(folder_of(tmp_path, "router", theirs)))
    plain = GrpcPrimary(server.address)
    try:
        expected = [step async for step in ScriptedPrimary(range(20)).generate(REQUEST)]
        open_stream = client.generate(REQUEST)
        steps = [await anext(open_stream)]
        for nobody in (stranger, plain):
            with pytest.raises(Unavailable):
                await nobody.info()
        renew(served, "primary", theirs)
        renew(mine, "router", theirs)
        assert await client.info() == INFO
        assert [*steps, *[step async for step in open_stream]] == expected
        with pytest.raises(Unavailable):  # it was trusted before
            await GrpcPrimary(server.address, PeerTls(folder_of(tmp_path, "router", ours))).info()
    finally:
        await asyncio.gather(*(each.close() for each in (client, stranger, plain)))
        await server.stop(0)


def test_the_port_answers_nothing_to_bytes_that_are_no_handshake(ours: Authority, tmp_path: Path) -> None:
    with drafter_behind(PeerTls(folder_of(tmp_path, "drafter", ours))) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            answer = stranger.recv(1024)
        assert len(answer) <= 7, "a TLS alert at most"
        friend = PeerTls(folder_of(tmp_path, "primary", ours)).channel_credentials()
        assert attempt(address, friend) is grpc.StatusCode.OK
