"""vLLM itself as the primary: the torch engine's tokens, with drafts and without, whatever happens to either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.errors import InvalidRequest
from tandem_serve.interfaces import DrafterLink
from tandem_serve.types import FinishReason, GenerationRequest, PrimaryInfo, SamplingParams
from tests.engines import GREEDY, Output, a_request, generate, make_drafter_engine, make_engine, tiny_drafter
from tests.scripted_link import MISBEHAVIOURS, ScriptedLink, misbehaviour, oracle
from tests.vllm_models import MODEL, build, needs_vllm

pytestmark = needs_vllm

SAMPLED = SamplingParams(temperature=0.8, top_p=0.97, seed=11)
SAMPLINGS = (GREEDY, SAMPLED, SamplingParams(top_k=20), SamplingParams(min_p=0.05), SamplingParams(temperature=1.3))


class Links:
    """A LinkFactory whose addresses a test defines."""

    def __init__(self) -> None:
        drafters = {name: make_drafter_engine(name, model=MODEL) for name in ("tandem", "plain")}
        self._local = local_link_factory(drafters, synchronous=True)
        self.scripted: dict[str, ScriptedLink] = {}

    def __call__(self, address: str, primary: PrimaryInfo, wake: Callable[[], None]) -> DrafterLink:
        scripted = self.scripted.get(address)
        return self._local(address, primary, wake) if scripted is None else scripted(address, primary, wake)


@pytest.fixture(scope="module")
def links() -> Links:
    return Links()


@pytest.fixture(scope="module")
def engine(links: Links) -> Iterator[Any]:
    """Its KV cache is small enough for preemptions, its steps for chunked prompts; prefix caching is on."""
    engine = build(links, draft_timeout_s=0.05)
    yield engine
    engine.close()


def requests(name: str, count: int = 16, **fields: Any) -> list[GenerationRequest]:
    """Mixed lengths and ways of sampling."""
    return [
        a_request(
            f"{name}-{i}",
            [(7 * i + 3 * j) % 280 + 1 for j in range(1 + 13 * i % 90)],
            20 + 5 * i % 40,
            replace(SAMPLINGS[i % len(SAMPLINGS)], seed=i),
            **fields,
        )
        for i in range(count)
    ]


def tokens(outputs: dict[str, Output]) -> list[tuple[int, ...]]:
    assert not any(output.errors for output in outputs.values())
    return [output.token_ids for output in outputs.values()]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """By the torch engine, without drafts."""
    return tokens(generate(make_engine(model=MODEL), requests("torch")))


@pytest.mark.parametrize("drafter", ["nobody", "tandem", "plain"])
def test_tokens_are_the_torch_engines_with_every_drafter(
    engine: Any, expected: list[tuple[int, ...]], drafter: str
) -> None:
    engine.set_drafters([] if drafter == "nobody" else [drafter])
    outputs = generate(engine, requests(drafter))
    assert tokens(outputs) == expected
    num_accepted = sum(output.num_accepted_tokens for output in outputs.values())
    assert num_accepted == 0 if drafter == "nobody" else num_accepted > 100
    assert all(step.num_accepted_tokens <= step.num_draft_tokens for o in outputs.values() for step in o.steps)


def test_preempted_requests_and_cached_prefixes_are_lossless(engine: Any) -> None:
    """Sixteen sequences that share a prefix and outgrow the KV cache together."""
    engine.set_drafters(["tandem"])
    prefix = [(5 * j) % 280 + 1 for j in range(70)]

    def batch(name: str, block_length: int | None) -> list[GenerationRequest]:
        return [
            a_request(f"{name}-{i}", [*prefix, i + 1], 180, replace(SAMPLED, seed=i), block_length=block_length)
            for i in range(16)
        ]

    preempted = []
    scheduler = engine._scheduler
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda *a, **k: (preempted.append(1), original(*a, **k))[1]
    try:
        drafted = generate(engine, batch("drafted", None))
    finally:
        del scheduler._preempt_request
    assert preempted, "the cache was meant to be too small"
    assert tokens(drafted) == tokens(generate(make_engine(model=MODEL), batch("torch", 0)))
    again = generate(engine, batch("again", None)[:2])
    assert tokens(again) == tokens(drafted)[:2]
    assert all(output.num_accepted_tokens > 10 for output in again.values()), "drafted from kept representations"


@pytest.mark.parametrize("kind", MISBEHAVIOURS)
def test_no_drafter_can_change_a_token(engine: Any, links: Links, expected: list[tuple[int, ...]], kind: str) -> None:
    asked = requests(f"bad-{kind}", 4, drafter_address=f"bad-{kind}")
    right = oracle({r.request_id: r.prompt_token_ids + t for r, t in zip(asked, expected, strict=False)})
    link = ScriptedLink(tiny_drafter("tandem", MODEL)[1], misbehaviour(kind, right, MODEL.vocab_size))
    links.scripted[f"bad-{kind}"] = link
    engine.set_drafters([f"bad-{kind}"])
    assert tokens(generate(engine, asked)) == expected[:4]
    assert link.lives or link.commands


def test_stop_tokens_logprobs_and_lengths_agree_with_the_torch_engine(engine: Any) -> None:
    engine.set_drafters(["tandem"])
    reference = make_engine(model=MODEL)
    plain = generate(reference, [a_request("p", (9, 8, 7), 30, SAMPLED)])["p"]
    stop = plain.token_ids[17]
    asked = a_request("s", (9, 8, 7), 30, SAMPLED, stop_token_ids=(stop,), num_logprobs=3)
    ours, theirs = (generate(each, [asked])["s"] for each in (engine, reference))
    assert ours.token_ids == theirs.token_ids
    assert ours.finish_reason is theirs.finish_reason is FinishReason.STOP
    for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert a.token_id == b.token_id
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert [i for i, _ in a.top] == [i for i, _ in b.top]
    chosen_only = generate(engine, [replace(asked, request_id="c", num_logprobs=0)])["c"]
    assert [each.top for each in chosen_only.logprobs] == [()] * len(chosen_only.token_ids)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "of_vllm",
    [
        {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.4},
        {"min_tokens": 25, "stop_token_ids": list(range(0, 287, 2))},
        {"allowed_token_ids": list(range(3, 200, 3))},
    ],
    ids=["penalties", "min_tokens", "masks"],
)
def test_what_vllm_does_to_logits_holds_with_drafts(
    engine: Any, monkeypatch: pytest.MonkeyPatch, of_vllm: dict[str, Any], sampling: SamplingParams
) -> None:
    """Our API does not ask for these, vLLM's own server does: they are put into what vLLM is given."""
    original = engine._sampling_params

    def with_more(request: GenerationRequest) -> Any:
        params = original(request)
        for name, value in of_vllm.items():
            setattr(params, name, value)
        params.__post_init__()
        return params

    engine.set_drafters(["tandem"])
    asked = [a_request(f"{i}", range(3, 9 + i), 40, replace(sampling, seed=i)) for i in range(4)]
    usual = tokens(generate(engine, [replace(each, request_id=f"u{each.request_id}") for each in asked]))
    monkeypatch.setattr(engine, "_sampling_params", with_more)
    plain = [replace(each, request_id=f"p{each.request_id}", block_length=0) for each in asked]
    expected = tokens(generate(engine, plain))
    outputs = generate(engine, [replace(each, request_id=f"d{each.request_id}") for each in asked])
    assert tokens(outputs) == expected
    assert expected != usual, "it was meant to make a difference"
    assert sum(output.num_accepted_tokens for output in outputs.values()) > 0


def test_requests_are_aborted_refused_and_their_drafting_ends(engine: Any) -> None:
    engine.set_drafters(["tandem"])
    output = Output()
    engine.submit(a_request("abort", (1, 2), 400), output)
    while len(output.token_ids) < 8:
        engine.step()
    assert engine.status().num_requests_running == 1
    engine.abort("abort")
    engine.run_until_idle()
    assert output.finish_reason is FinishReason.ABORT
    with pytest.raises(InvalidRequest, match="exceed"):
        engine.submit(a_request("long", (1, 2), 4000), output)
    assert engine.status().num_requests_running == 0
    assert dict(engine.status().drafters)["tandem"] == "ready"
    assert not engine._drafting._sequences
