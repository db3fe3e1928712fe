"""What any running cluster must do for its clients, however its pools were started.

Subclasses give a `cluster` fixture; it serves a tiny pair whose drafter is often right (tests/checkpoints.py).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem_serve.models.decoder import DecoderConfig
from tests.checkpoints import CONFIG, make_drafter, make_primary

PROMPT = "def fib(n):\n"
LONG = 1800  # tokens: a stream that still runs when the next line of the test does
SERVICE = "tandem.v1.InferenceService"


@dataclass(frozen=True)
class Cluster:
    """Where a cluster answers. `drafter_sequences`: how many sequences the drafter pool holds."""

    http: str
    grpc: str
    model: str
    drafter_sequences: Callable[[], int]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.http}/v1", api_key="none", max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.http}/v1", api_key="none", max_retries=0)

    def complete(self, prompt: str = PROMPT, **body: Any) -> dict[str, Any]:
        """A whole completion as JSON."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 48, "temperature": 0, **body}
        response = httpx.post(f"{self.http}/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def text(self, prompt: str = PROMPT, **body: Any) -> str:
        return str(self.complete(prompt, **body)["choices"][0]["text"])

    def choices_while(self, disturb: Mapping[int, Callable[[], None]], **body: Any) -> list[dict[str, Any]]:
        """A streamed completion's choices, one an event, with token ids; disturb[i] is called once i have come."""
        body = {"model": self.model, "prompt": PROMPT, "stream": True, "return_token_ids": True, **body}
        choices: list[dict[str, Any]] = []
        with httpx.stream("POST", f"{self.http}/v1/completions", json=body, timeout=180) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    choices.append(event["choices"][0])
                    disturb.get(len(choices), lambda: None)()
        return choices

    def num_running(self) -> int:
        """Sequences at all primaries."""
        status = httpx.get(f"{self.http}/status", timeout=10).json()
        found = [primary["status"] for primary in status["primaries"] if primary["status"] is not None]
        return sum(each["num_requests_running"] + each["num_requests_waiting"] for each in found)


def make_pair(folder: Path, config: DecoderConfig = CONFIG) -> tuple[Path, Path]:
    """A tiny primary with room for LONG tokens, and its drafter."""
    primary = make_primary(folder / "primary", config=replace(config, max_position_embeddings=2048))
    return primary, make_drafter(folder / "drafter", primary)


def eventually(holds: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Polls until it holds; fails the test, saying what did not, at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def reflected(channel: grpc.Channel) -> tuple[Any, Callable[[str], Any]]:
    """The service's descriptor and message classes by name, as the server itself describes them."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName(SERVICE)
    return service, lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tandem.v1.{name}"))


class ServingContract:
    """Inherit, and define the fixture `cluster`."""

    # -------------------------------------------------------------- OpenAI's client

    def test_a_completion_streams_the_text_it_would_return_whole(self, cluster: Cluster) -> None:
        with cluster.client() as client:
            assert [model.id for model in client.models.list()] == [cluster.model]
            arguments: dict[str, Any] = {"model": cluster.model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
            whole = client.completions.create(**arguments)
            chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 48
        text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
        assert text == whole.choices[0].text
        assert len(chunks) > 5
        assert chunks[-1].usage == whole.usage

    def test_speculative_text_is_plain_text(self, cluster: Cluster) -> None:
        for sampling in (
            {"temperature": 0},
            {"temperature": 0.8, "seed": 11},
            {"temperature": 1.0, "top_p": 0.9, "seed": -2},
        ):
            plain = cluster.complete(block_length=0, **sampling)
            speculative = cluster.complete(block_length=4, **sampling)
            assert speculative["choices"] == plain["choices"]
            assert "metrics" not in plain
            assert speculative["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0

    def test_logprobs_are_the_primary_s(self, cluster: Cluster) -> None:
        plain = cluster.complete(block_length=0, logprobs=2)["choices"][0]["logprobs"]
        speculative = cluster.complete(block_length=4, logprobs=2)["choices"][0]["logprobs"]
        assert speculative["tokens"] == plain["tokens"]
        assert speculative["token_logprobs"] == pytest.approx(plain["token_logprobs"], abs=1e-3)
        for top, chosen in zip(plain["top_logprobs"], plain["token_logprobs"], strict=True):
            assert max(top.values()) == chosen  # greedy

    def test_four_completions_of_one_prompt(self, cluster: Cluster) -> None:
        arguments: dict[str, Any] = {
            "model": cluster.model,
            "prompt": PROMPT,
            "temperature": 1,
            "seed": 5,
            "max_tokens": 24,
        }
        with cluster.client() as client:
            four = client.completions.create(**arguments, n=4)
            one = client.completions.create(**arguments)
        texts = [choice.text for choice in four.choices]
        assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
        assert texts[0] == one.choices[0].text
        assert len(set(texts)) == 4

    async def test_32_concurrent_streams(self, cluster: Cluster) -> None:
        prompts = [f"for i in range({number}):" for number in range(32)]

        async def streamed(client: openai.AsyncOpenAI, prompt: str) -> str:
            stream = await client.completions.create(
                model=cluster.model, prompt=prompt, max_tokens=32, temperature=0.7, seed=len(prompt), stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        async with cluster.async_client() as client:
            together = await asyncio.gather(*(streamed(client, prompt) for prompt in prompts))
        alone = [
            cluster.text(prompt, max_tokens=32, temperature=0.7, seed=len(prompt), block_length=0)
            for prompt in prompts[:4]
        ]
        assert together[:4] == alone
        assert all(together)

    def test_errors_reach_openai_s_client_as_its_own(self, cluster: Cluster) -> None:
        with cluster.client() as client:
            with pytest.raises(openai.BadRequestError, match="temperature") as raised:
                client.completions.create(model=cluster.model, prompt="a", temperature=7)
            assert raised.value.param == "temperature"
            with pytest.raises(openai.NotFoundError, match="other"):
                client.completions.create(model="other", prompt="a")
            with pytest.raises(openai.BadRequestError, match="chat template"):
                client.chat.completions.create(model=cluster.model, messages=[{"role": "user", "content": "hi"}])

    # -------------------------------------------------------------- gRPC

    def test_a_grpc_client_needs_nothing_but_reflection(self, cluster: Cluster) -> None:
        with grpc.insecure_channel(cluster.grpc) as channel:
            service, message = reflected(channel)
            assert {method.name for method in service.methods} == {"Generate", "ListModels"}
            list_models = channel.unary_unary(
                f"/{SERVICE}/ListModels",
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=message("ListModelsResponse").FromString,
            )
            generate = channel.unary_stream(
                f"/{SERVICE}/Generate",
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=message("GenerateResponse").FromString,
            )
            models = list_models(message("ListModelsRequest")(), timeout=30).models
            assert [model.id for model in models] == [cluster.model]
            request = message("GenerateRequest")(text=PROMPT, max_tokens=48, temperature=0)
            responses = list(generate(request, timeout=60))
            assert "".join(response.text for response in responses) == cluster.text()
            assert responses[-1].usage.completion_tokens == 48
            assert sum(response.num_accepted_tokens for response in responses) > 0
            wrong = message("GenerateRequest")(text=PROMPT, temperature=9)
            with pytest.raises(grpc.RpcError) as raised:
                list(generate(wrong, timeout=30))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "temperature" in raised.value.details()

    def test_a_cancelled_grpc_call_frees_both_pools(self, cluster: Cluster) -> None:
        with grpc.insecure_channel(cluster.grpc) as channel:
            _, message = reflected(channel)
            generate = channel.unary_stream(
                f"/{SERVICE}/Generate",
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=message("GenerateResponse").FromString,
            )
            call = generate(message("GenerateRequest")(text=PROMPT, max_tokens=LONG, ignore_eos=True), timeout=60)
            next(call)
            call.cancel()
        self.assert_idle(cluster)

    def test_grpc_health(self, cluster: Cluster) -> None:
        with grpc.insecure_channel(cluster.grpc) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    # -------------------------------------------------------------- going away, and worse

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_goes_away_frees_both_pools(self, cluster: Cluster, stream: bool) -> None:
        body = {
            "prompt": PROMPT,
            "max_tokens": LONG,
            "temperature": 1,
            "seed": 1,
            "ignore_eos": True,
            "n": 4,
            "stream": stream,
        }
        with httpx.Client(timeout=60) as client:
            sending = client.build_request("POST", f"{cluster.http}/v1/completions", json=body)
            if stream:
                response = client.send(sending, stream=True)
                assert next(response.iter_lines()).startswith("data: ")
                response.close()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.send(client.build_request("POST", sending.url, json=body, timeout=0.2))
        self.assert_idle(cluster)

    def assert_idle(self, cluster: Cluster) -> None:
        eventually(lambda: cluster.num_running() == 0, "the primaries let go of the sequence", 15)
        eventually(lambda: cluster.drafter_sequences() == 0, "the drafters let go of the sequence", 15)

    def test_bad_bodies_do_no_harm(self, cluster: Cluster) -> None:
        with httpx.Client(base_url=cluster.http, timeout=30) as client:

            @given(body=BODIES)
            @settings(max_examples=200, suppress_health_check=list(HealthCheck))
            def no_body_is_answered_with_a_server_error(body: bytes) -> None:
                response = client.post("/v1/completions", content=body)
                assert response.status_code in (200, 400, 404, 413), (response.status_code, response.text)
                if response.status_code != 200:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            no_body_is_answered_with_a_server_error()
        assert cluster.text()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = [
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "stop",
    "logprobs",
    "x",
]
_OBJECTS = st.dictionaries(st.sampled_from(_FIELDS), _JSON, min_size=1, max_size=4)
BODIES = st.binary(max_size=200) | _OBJECTS.map(lambda body: json.dumps({"prompt": "a", **body}).encode())
