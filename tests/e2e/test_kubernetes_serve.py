"""The RayService of k8s/base, deployed by Ray Serve on nodes with the labels of its pods: placed, guarded, answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem_serve.rpc._gen.tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_serve.serving.api_keys import key_line, new_key
from tests.certificates import Authority, folder_of
from tests.e2e.labelled_cluster import PLACED
from tests.serving_contract import eventually, make_pair

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BASE = Path(__file__).parents[2] / "k8s" / "base" / "rayservice.yaml"
KEY = new_key()
METADATA = (("application", "tandem"),)


@dataclass
class Deployed:
    http: str
    grpc: str
    placed: dict[str, list[dict[str, str]]]


def service_here(folder: Path) -> tuple[Path, int, int]:
    """The base, with paths of its pods replaced by paths of this machine, and free ports."""
    primary, drafter = make_pair(folder)
    authority = Authority.new()
    (folder / "keys").write_text(key_line("test", KEY) + "\n")
    here = {
        "primary": {"model": str(primary), "tls_folder": str(folder_of(folder, "primary", authority))},
        "drafter": {"model": str(drafter), "tls_folder": str(folder_of(folder, "drafter", authority))},
        "router": {"api_keys_file": str(folder / "keys")},
    }
    service = yaml.safe_load(BASE.read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    for application in config["applications"]:
        pool = application["args"]["pool"]
        changes = here[pool["resources"]["label_selector"]["pool"]]
        assert changes.keys() <= pool.keys()
        pool.update(changes)
        pool["resources"]["num_threads"] = 1
        if "model" in application["args"]:
            application["args"]["model"] = str(primary)
    http_port, grpc_port = _free_port(), _free_port()
    config["http_options"].update(host="127.0.0.1", port=http_port)
    config["grpc_options"]["port"] = grpc_port
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    (folder / "service.yaml").write_text(yaml.safe_dump(service))
    return folder / "service.yaml", http_port, grpc_port


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("kubernetes")
    file, http_port, grpc_port = service_here(folder)
    environment = {
        **os.environ,
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_raylet_start_wait_time_s": "120",  # five raylets on two cores
        **{
            variable["name"]: variable["value"]
            for variable in yaml.safe_load(file.read_text())["spec"]["rayClusterConfig"]["headGroupSpec"]["template"][
                "spec"
            ]["containers"][0]["env"]
        },
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.labelled_cluster", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=BASE.parents[2],
            text=True,
        )
    assert process.stdout is not None
    assert process.stdin is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith(PLACED):
                break
        assert said, (folder / "log").read_text()[-4000:]
        assert said[-1].startswith(PLACED), "".join(said)[-4000:] + (folder / "log").read_text()[-4000:]
        placed = json.loads(said[-1].removeprefix(PLACED))
        deployed = Deployed(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", placed)
        eventually(
            lambda: httpx.get(f"{deployed.http}/health", timeout=10).status_code == 200, "the router is well", 60
        )
        yield deployed
    finally:
        process.stdin.close()
        status = process.wait(120)
    assert status == 0, (folder / "log").read_text()[-4000:]


def complete(deployed: Deployed, **headers: str) -> httpx.Response:
    body = {"model": "tandem-demo", "prompt": "def", "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    return httpx.post(f"{deployed.http}/v1/completions", json=body, headers=headers, timeout=60)


def with_key() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


def test_every_replica_runs_on_a_node_of_its_pool(deployed: Deployed) -> None:
    pools = {name: [labels["pool"] for labels in found] for name, found in deployed.placed.items()}
    assert pools == {
        "tandem-primary": ["primary"],
        "tandem-drafter": ["drafter"],
        "tandem": ["router", "router"],
    }


def test_pools_speak_with_each_other_by_certificate_alone(deployed: Deployed) -> None:
    def linked() -> list[str]:
        status = httpx.get(f"{deployed.http}/status", headers=with_key(), timeout=10).json()
        return [drafter["address"] for drafter in status["drafters"] if drafter["linked_primaries"]]

    eventually(lambda: len(linked()) == 1, "the primary is linked to the drafter")
    response = complete(deployed, **with_key())
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["num_accepted_tokens"] > 0
    with (
        grpc.insecure_channel(linked()[0], [("grpc.enable_retries", 0)]) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert complete(deployed, **with_key()).json()["choices"][0]["num_accepted_tokens"] > 0


def test_http_wants_a_key_for_all_but_health(deployed: Deployed) -> None:
    assert complete(deployed).status_code == 401
    assert complete(deployed, authorization=f"Bearer {new_key()}").status_code == 401
    for path in ("/v1/models", "/status", "/metrics", "/nothing"):
        assert httpx.get(f"{deployed.http}{path}", timeout=10).status_code == 401
    assert httpx.get(f"{deployed.http}/health", timeout=10).status_code == 200


def test_grpc_wants_a_key_for_all_but_health(deployed: Deployed) -> None:
    with grpc.insecure_channel(deployed.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(text="def", max_tokens=8, temperature=0)
        for metadata in (METADATA, (*METADATA, ("authorization", f"Bearer {new_key()}"))):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(request, metadata=metadata, timeout=30))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (*METADATA, *with_key().items())
        assert len(stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=30).models) == 1
        named = (*metadata, ("x-request-id", "order-66"))
        call = stub.Generate(request, metadata=named, timeout=30)
        assert list(call)
        assert ("x-request-id", "order-66") in call.trailing_metadata()
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), metadata=METADATA, timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_grpc_message_too_long_is_refused_by_the_proxy(deployed: Deployed) -> None:
    with grpc.insecure_channel(deployed.grpc) as channel:
        call: Any = channel.unary_unary("/tandem.v1.InferenceService/ListModels")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\0" * (9 << 20), metadata=METADATA, timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
