"""OpenAI's HTTP API over a scripted primary: shapes, and what is refused how. (The engines: tests/integration.)"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem_serve.config import RouterLimits
from tandem_serve.errors import ModelMismatch, Overloaded, Unavailable
from tandem_serve.serving.chat import load_chat_template
from tandem_serve.serving.completion import TextCompletion
from tandem_serve.serving.exposition import Target
from tandem_serve.serving.metrics import RouterMetrics
from tandem_serve.serving.observed import ObservedTextService
from tandem_serve.serving.openai_api import FrontEnd, create_app
from tandem_serve.serving.router import PairingRouter
from tandem_serve.serving.tracing import Tracing
from tandem_serve.types import DecodingMode, PolicyName
from tests.checkpoints import END_OF_TEXT_ID, make_tokenizer
from tests.unit.scripted_primary import ScriptedPrimary

TOKENIZER = make_tokenizer()
SAID = TOKENIZER.encode("one two three").ids
CHATML = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def app_over(primary: ScriptedPrimary, chat_folder: Path | None = None) -> Any:
    router = PairingRouter(start_timeout_s=0.0)
    router.set_primaries({"p0": primary})
    limits = RouterLimits(max_n=4, max_prompts=3, max_logprobs=5, max_body_bytes=4096)
    service = TextCompletion(router, TOKENIZER, model_name="m", eos_token_ids=(END_OF_TEXT_ID,), limits=lambda: limits)
    metrics = RouterMetrics()
    metrics.watch(router)
    template = load_chat_template(chat_folder, TOKENIZER) if chat_folder else None
    observed = ObservedTextService(service, metrics, Tracing())
    targets = [Target("10.0.0.1:9520", {"pool": "primary", "replica": "a"})]
    return create_app(
        FrontEnd(observed, TOKENIZER, template, "m", lambda: limits, metrics, router.overview, lambda: targets)
    )


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


@pytest.fixture
def primary() -> ScriptedPrimary:
    return ScriptedPrimary(SAID)


@pytest.fixture
async def client(primary: ScriptedPrimary) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_over(primary)) as client:
        yield client


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    return folder


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "m", "prompt": "say", "max_tokens": 40, **body})


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# ------------------------------------------------------------------ shapes


async def test_a_completion(client: httpx.AsyncClient) -> None:
    body = (await complete(client)).json()
    assert body["object"] == "text_completion"
    assert body["model"] == "m"
    assert body["choices"] == [{"index": 0, "text": "one two three", "finish_reason": "stop", "logprobs": None}]
    num_prompt = len(TOKENIZER.encode("say").ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(SAID),
        "total_tokens": num_prompt + len(SAID),
    }
    speculative = body["metrics"]["speculative_decoding"]
    assert speculative["num_accepted_draft_tokens"] <= speculative["num_draft_tokens"]
    assert sum(speculative["acceptance_histogram"]) == speculative["num_spec_steps"]
    assert speculative["mean_acceptance_length"] == pytest.approx(
        1 + speculative["num_accepted_draft_tokens"] / speculative["num_spec_steps"]
    )


async def test_plain_decoding_reports_no_speculation(client: httpx.AsyncClient) -> None:
    assert "metrics" not in (await complete(client, block_length=0)).json()


async def test_prompts_and_n_make_choices_in_openai_s_order(
    client: httpx.AsyncClient, primary: ScriptedPrimary
) -> None:
    body = (await complete(client, prompt=["a", "bc"], n=2, seed=5)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    prompts = [request.prompt_token_ids for request in primary.requests]
    a, bc = tuple(TOKENIZER.encode("a").ids), tuple(TOKENIZER.encode("bc").ids)
    assert sorted(prompts) == sorted([a, a, bc, bc])
    seeds = {request.sampling.seed for request in primary.requests}
    assert len(seeds) == 2  # the completions differ, the prompts do not
    assert 5 in seeds
    assert body["usage"]["prompt_tokens"] == len(a) + len(bc)
    assert body["usage"]["completion_tokens"] == 4 * len(SAID)


@pytest.mark.parametrize(
    ("prompt", "expected"), [([1, 2], [(1, 2)]), ([[1, 2], [3]], [(1, 2), (3,)]), (["\u00e9"], None)]
)
async def test_prompts_may_be_token_ids(
    client: httpx.AsyncClient, primary: ScriptedPrimary, prompt: Any, expected: list[tuple[int, ...]] | None
) -> None:
    assert (await complete(client, prompt=prompt)).status_code == 200
    sent = [request.prompt_token_ids for request in primary.requests]
    assert sorted(sent) == sorted(expected or [tuple(TOKENIZER.encode(prompt[0]).ids)])


async def test_parameters_reach_the_primary(client: httpx.AsyncClient, primary: ScriptedPrimary) -> None:
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -3, "block_length": 2}
    await complete(client, max_tokens=9, stop_token_ids=[5], **body)
    await complete(client, ignore_eos=True, top_k=-1)
    first, second = primary.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.seed, first.block_length) == (0.1, -3, 2)
    assert (first.policy, first.threshold) == (None, None)
    assert (first.max_tokens, first.stop_token_ids) == (9, (END_OF_TEXT_ID, 5))
    assert (second.stop_token_ids, second.sampling.top_k, second.sampling.temperature) == ((), 0, 1.0)


async def test_how_drafts_are_made_reaches_the_primary(client: httpx.AsyncClient, primary: ScriptedPrimary) -> None:
    await complete(client, speculation={"block_length": 7, "policy": "entropy", "threshold": 0.25})
    await complete(client, speculation={"block_length": 700, "mode": "tandem-representations"})
    await complete(client, speculation={"mode": "plain"})
    adaptive, standalone, plain = primary.requests
    assert (adaptive.block_length, adaptive.policy, adaptive.threshold) == (7, PolicyName.ENTROPY, 0.25)
    assert adaptive.mode is DecodingMode.SPECULATIVE
    assert (standalone.block_length, standalone.mode) == (700, DecodingMode.TANDEM_REPRESENTATIONS)
    assert plain.mode is DecodingMode.PLAIN


async def test_null_is_the_same_as_absent(client: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(["echo", "ignore_eos", "return_token_ids", "stream", "stop", "temperature", "n", "logprobs"])
    answer = await complete(client, **nulls)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == (await complete(client)).json()["choices"]
    assert error_of(await complete(client, echo="yes"))["param"] == "echo"


async def test_requests_without_a_seed_get_different_ones(client: httpx.AsyncClient, primary: ScriptedPrimary) -> None:
    for _ in range(2):
        await complete(client)
    assert primary.requests[0].sampling.seed != primary.requests[1].sampling.seed


async def test_a_stream_has_the_text_of_a_whole_response(client: httpx.AsyncClient) -> None:
    whole = (await complete(client, n=2)).json()
    events = events_of(await complete(client, n=2, stream=True, stream_options={"include_usage": True}))
    *chunks, last = events
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == whole["choices"][index]["text"]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert "usage" not in events_of(await complete(client, stream=True))[-1]


async def test_a_stop_string_ends_the_sequence_at_the_primary(
    client: httpx.AsyncClient, primary: ScriptedPrimary
) -> None:
    choice = (await complete(client, stop="wo")).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one t", "stop")
    assert primary.num_closed_early == 1


async def test_echo_starts_with_the_prompt(client: httpx.AsyncClient) -> None:
    assert (await complete(client, echo=True)).json()["choices"][0]["text"] == "sayone two three"
    events = events_of(await complete(client, echo=True, stream=True, prompt=TOKENIZER.encode("say").ids))
    assert "".join(event["choices"][0]["text"] for event in events) == "sayone two three"


async def test_completion_logprobs(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=2)).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "one two three"
    assert logprobs["token_logprobs"] == [-0.5] * len(SAID)
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    streamed = events_of(await complete(client, logprobs=2, stream=True))
    offsets = [offset for event in streamed for offset in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == logprobs["text_offset"]


async def test_origins_of_tokens_on_request(client: httpx.AsyncClient) -> None:
    events = events_of(await complete(client, return_token_ids=True, stream=True))
    choices = [event["choices"][0] for event in events]
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == SAID
    first = choices[0]
    assert first["num_accepted_tokens"] == 2
    assert first["text"][: first["num_accepted_chars"]] == TOKENIZER.decode(SAID[:2])


async def test_chat_without_a_template_is_refused_clearly(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert "no chat template" in error_of(response)["message"]


async def test_chat(primary: ScriptedPrimary, chat_folder: Path) -> None:
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "so"},
    ]
    async with client_of(app_over(primary, chat_folder)) as client:
        answer = await client.post(
            "/v1/chat/completions",
            json={"model": "m", "messages": messages, "logprobs": True, "top_logprobs": 1, "tools": []},
        )
        streamed = await client.post("/v1/chat/completions", json={"messages": messages, "stream": True})
        refused = await client.post("/v1/chat/completions", json={"messages": [{"role": "developer", "content": ""}]})
    choice = answer.json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "one two three"}
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["token"] == TOKENIZER.decode(SAID[:1])
    prompt = "<system>be<user>hi<assistant>yes<user>so<assistant>"
    assert primary.requests[0].prompt_token_ids == tuple(TOKENIZER.encode(prompt).ids)
    assert primary.requests[0].max_tokens == 512 - len(primary.requests[0].prompt_token_ids)  # as many as fit
    deltas = [event["choices"][0]["delta"] for event in events_of(streamed)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "one two three"
    assert "no developers here" in error_of(refused)["message"]


async def test_models_health_status_metrics(client: httpx.AsyncClient) -> None:
    await complete(client)
    models = (await client.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["m"]
    assert (await client.get("/v1/models/m")).json() == models["data"][0]
    error_of(await client.get("/v1/models/other"), 404)
    assert (await client.get("/health")).status_code == 200
    status = (await client.get("/status")).json()
    assert [primary["name"] for primary in status["primaries"]] == ["p0"]
    metrics = (await client.get("/metrics")).text
    assert f"tandem:router_generation_tokens_total {len(SAID)}.0" in metrics
    assert 'tandem:router_completions_total{finished_reason="stop"} 1.0' in metrics
    assert 'tandem:router_num_sequences{member="p0",of="primary"} 0.0' in metrics
    assert "tandem:router_e2e_request_latency_seconds_count 1.0" in metrics
    assert "vllm:" not in metrics  # those are the primaries', or sums would count twice
    assert (await client.get("/metrics/targets")).json() == [
        {"targets": ["10.0.0.1:9520"], "labels": {"pool": "primary", "replica": "a"}}
    ]


async def test_requests_that_fail_are_counted_by_cause(client: httpx.AsyncClient, primary: ScriptedPrimary) -> None:
    await complete(client, max_tokens=4000)
    assert 'tandem:router_errors_total{kind="invalid_request"} 1.0' in (await client.get("/metrics")).text


# ------------------------------------------------------------------ refusals

NEUTRAL = {
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "n": 1,
    "user": "me",
    "suffix": None,
    "metadata": {"a": "b"},
    "response_format": {"type": "text"},
    "temperature": None,
    "seed": None,
    "stop": None,
    "stream_options": None,
}


async def test_neutral_values_of_what_is_not_supported_are_taken(client: httpx.AsyncClient) -> None:
    assert (await complete(client, **NEUTRAL)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"verbosity": "low"}, "verbosity"),
        ({"wizardry": 1}, "wizardry"),
        ({"stream_options": {"wizardry": 1}}, "stream_options.wizardry"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1 << 40}, "top_k"),
        ({"min_p": 1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 600}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["x" * 300]}, "stop[0]"),
        ({"stop_token_ids": [288]}, "stop_token_ids[0]"),
        ({"block_length": 65}, "block_length"),
        ({"speculation": {"block_length": 65}}, "speculation.block_length"),
        ({"speculation": {"block_length": 3}, "block_length": 3}, "speculation.block_length"),
        ({"speculation": {"policy": "psychic"}}, "speculation.policy"),
        ({"speculation": {"policy": "router", "threshold": 1.5}}, "speculation.threshold"),
        ({"speculation": {"threshold": 0.5}}, "speculation.threshold"),
        ({"speculation": {"policy": "fixed", "threshold": 0.5}}, "speculation.threshold"),
        ({"speculation": {"luck": 1}}, "speculation.luck"),
        ({"speculation": {"mode": "telepathic"}}, "speculation.mode"),
        ({"speculation": {"mode": "tandem", "policy": "router"}}, "speculation.policy"),
        ({"speculation": {"mode": "tandem"}, "logprobs": 1}, "logprobs"),
        ({"speculation": 4}, "speculation"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, 288]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 4}, "prompt"),
        ({"prompt": [1] * 512}, "prompt"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "temperature": 3}, "temperature"),
        ({"stream": True, "prompt": [288]}, "prompt[0]"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, primary: ScriptedPrimary, body: dict[str, Any], param: str
) -> None:
    error = error_of(await complete(client, **body))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not primary.requests


async def test_a_missing_prompt_is_named(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json={"model": "m"}))
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stop": "\\ud800"}',
        b'{"seed": ' + b"9" * 4000 + b', "prompt": "a"}',
        b"[" * 4000,
    ],
)
async def test_malformed_bodies(client: httpx.AsyncClient, raw: bytes) -> None:
    error_of(await client.post("/v1/completions", content=raw))


async def test_too_large_a_body_is_not_read_to_its_end(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1024

    error_of(await client.post("/v1/completions", content=endless()), 413)
    error_of(await client.post("/v1/completions", content=b"x" * 5000), 413)


async def test_unknown_models_routes_and_methods(client: httpx.AsyncClient) -> None:
    assert error_of(await complete(client, model="gpt-9"), 404)["code"] == "model_not_found"
    error_of(await client.get("/v1/embeddings"), 404)
    error_of(await client.get("/v1/completions"), 405)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("full", retry_after_s=2.5), 429),
        (Unavailable("gone"), 503),
        (ModelMismatch("other"), 409),
        (RuntimeError("a secret"), 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_openai_s_shape(error: Exception, status: int, stream: bool) -> None:
    async with client_of(app_over(ScriptedPrimary(SAID, error=error))) as client:
        response = await complete(client, stream=stream)
    answer = error_of(response, status)
    assert "secret" not in answer["message"]
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


async def test_an_error_in_mid_stream_becomes_the_last_event() -> None:
    async with client_of(app_over(ScriptedPrimary(SAID, error=RuntimeError("a secret"), error_after=3))) as client:
        events = events_of(await complete(client, stream=True))
    assert events[0]["choices"][0]["text"]
    assert events[-1]["error"]["code"] == "internal_error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
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
    "stream",
    "logprobs",
]


@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=4))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_body_makes_the_server_fail(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    raw = json.dumps({"prompt": "say", **body})  # NaN and all
    response = await client.post("/v1/completions", content=raw)
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        error_of(response, response.status_code)
