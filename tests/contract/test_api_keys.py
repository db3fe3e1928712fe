"""API keys over HTTP and gRPC: who is let in, and what the file of keys may do meanwhile."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from starlette.routing import Route
from typer.testing import CliRunner

from tandem_serve.cli import app as command_line
from tandem_serve.config import RouterLimits
from tandem_serve.errors import ConfigError, Unauthenticated
from tandem_serve.rpc._gen.tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_serve.rpc.inference_server import InferenceServer
from tandem_serve.serving.api_keys import ApiKeys, key_line, new_key
from tandem_serve.serving.metrics import RouterMetrics
from tandem_serve.serving.openai_api import FrontEnd, create_app
from tandem_serve.serving.router import PairingRouter
from tests.checkpoints import make_tokenizer
from tests.scripted_text import ScriptedText
from tests.unit.scripted_primary import ScriptedPrimary

KEY = new_key()
WRONG = [
    {},
    {"authorization": f"Bearer {new_key()}"},
    {"authorization": KEY},
    {"authorization": f"Basic {KEY}"},
    {"authorization": "Bearer"},
    {"authorization": f"Bearer {KEY[:-1]}"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# who may\n\n{key_line('someone', new_key())}\n{key_line('me', KEY)}  # mine\n")
    return file


def front_end(keys: ApiKeys | None) -> FrontEnd:
    router = PairingRouter(start_timeout_s=0.0)
    router.set_primaries({"p": ScriptedPrimary()})
    metrics = RouterMetrics()
    return FrontEnd(ScriptedText(), make_tokenizer(), None, "demo", RouterLimits, metrics, router.overview, list, keys)


async def statuses(keys: ApiKeys | None, headers: dict[str, str]) -> dict[str, int]:
    """Of every route, asked in the way it is meant to be, and of one that does not exist."""
    app = create_app(front_end(keys))
    found = {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        for route in [*app.routes, Route("/nothing", lambda _: None)]:
            assert isinstance(route, Route)
            path = route.path.replace("{model:path}", "demo")
            method = "POST" if "POST" in (route.methods or ()) else "GET"
            body = {"model": "demo", "prompt": "a"} if method == "POST" else None
            response = await client.request(method, path, json=body)
            found[path] = response.status_code
            if response.status_code == 401:
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
    return found


@pytest.mark.parametrize("headers", WRONG)
async def test_every_http_route_but_health_is_401_without_a_key(file: Path, headers: dict[str, str]) -> None:
    found = await statuses(ApiKeys(file), headers)
    assert len(found) >= 8
    assert found.pop("/health") == 200
    assert set(found.values()) == {401}


async def test_a_key_changes_nothing_else(file: Path) -> None:
    with_key = await statuses(ApiKeys(file), {"authorization": f"Bearer {KEY}"})
    assert with_key == await statuses(None, {})
    assert with_key["/v1/completions"] == 200
    assert with_key["/nothing"] == 404


@pytest.mark.parametrize("headers", WRONG)
async def test_every_grpc_method_but_health_is_unauthenticated_without_a_key(
    file: Path, headers: dict[str, str]
) -> None:
    assert await codes(file, headers) == {
        "Generate": grpc.StatusCode.UNAUTHENTICATED,
        "ListModels": grpc.StatusCode.UNAUTHENTICATED,
        "reflection": grpc.StatusCode.UNAUTHENTICATED,
        "unknown": grpc.StatusCode.UNAUTHENTICATED,
        "health": grpc.StatusCode.OK,
    }


async def test_grpc_takes_the_key_from_metadata(file: Path) -> None:
    found = await codes(file, {"authorization": f"Bearer {KEY}"})
    assert found.pop("unknown") is grpc.StatusCode.UNIMPLEMENTED
    assert set(found.values()) == {grpc.StatusCode.OK}


async def codes(file: Path, headers: dict[str, str]) -> dict[str, grpc.StatusCode]:
    server = InferenceServer(ScriptedText(), check_authorization=ApiKeys(file).check)
    await server.start()
    metadata = tuple(headers.items())
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        asking = reflection_pb2.ServerReflectionRequest(list_services="")
        unknown: Any = channel.unary_unary("/tandem.v1.InferenceService/Nothing")
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        request = inference_pb2.GenerateRequest(text="a", max_tokens=2)
        calls = {
            "Generate": stub.Generate(request, metadata=metadata, timeout=10),
            "ListModels": stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=10),
            "reflection": reflection.ServerReflectionInfo(iter([asking]), metadata=metadata, timeout=10),
            "unknown": unknown(b"", metadata=metadata, timeout=10),
            "health": health.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=10),
        }
        found = {name: await outcome(call) for name, call in calls.items()}
    await server.stop(0)
    return found


async def outcome(call: Any) -> grpc.StatusCode:
    with contextlib.suppress(grpc.aio.AioRpcError):
        if hasattr(call, "__aiter__"):  # a stream ends once it has been read
            async for _ in call:
                pass
    code: grpc.StatusCode = await call.code()
    return code


# ------------------------------------------------------------------ the file


def test_keys_come_and_go_with_their_lines(file: Path) -> None:
    keys, newcomer = ApiKeys(file), new_key()
    with pytest.raises(Unauthenticated):
        keys.check(f"Bearer {newcomer}")
    fresh = file.with_name("fresh")
    fresh.write_text(f"{key_line('newcomer', newcomer)}\n")
    fresh.replace(file)
    keys.check(f"bearer {newcomer}")
    with pytest.raises(Unauthenticated):
        keys.check(f"Bearer {KEY}")


@pytest.mark.parametrize("content", [KEY, "name 1234", "\0", None])
def test_a_file_that_breaks_is_logged_without_what_it_holds(
    file: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(file)
    file.unlink()
    if content is not None:
        file.write_text(content)
    keys.check(f"Bearer {KEY}")
    assert "those read before stay valid" in caplog.text
    assert KEY not in caplog.text
    with pytest.raises(ConfigError) as caught:
        ApiKeys(file)
    assert KEY not in str(caught.value)


def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    with pytest.raises(Unauthenticated):
        ApiKeys(tmp_path / "keys").check(f"Bearer {KEY}")


def test_keys_new_shows_the_key_once_and_writes_its_hash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "keys"
    shown = []
    for name in ("a", "b.c-d"):
        result = CliRunner().invoke(command_line, ["keys", "new", name, "--file", str(file)])
        assert result.exit_code == 0, result.output
        shown.append(result.stdout.strip())
    assert len(set(shown)) == 2
    keys = ApiKeys(file)
    for key in shown:
        keys.check(f"Bearer {key}")
        assert key not in file.read_text() + caplog.text
    assert [line.split()[0] for line in file.read_text().splitlines()] == ["a", "b.c-d"]
    assert CliRunner().invoke(command_line, ["keys", "new", "no such name"]).exit_code == 1
