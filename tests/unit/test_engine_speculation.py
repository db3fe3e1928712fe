"""Speculative decoding is lossless: the same tokens as plain decoding, whatever a drafter does or fails to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.config import PrimaryEngineConfig
from tandem_serve.decoding.block_policy import Round, StepSize
from tandem_serve.decoding.requested_policy import RequestedPolicy
from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.models.decoder import causal_attention
from tandem_serve.types import ExtendSequence, FinishReason, GenerationRequest, PolicyName, SamplingParams
from tests.checkpoints import CONFIG, VOCAB_SIZE
from tests.engines import (
    FAMILIES,
    GREEDY,
    Output,
    a_request,
    drive,
    generate,
    make_drafter_engine,
    make_engine,
    reference_tokens,
    step_of,
    tiny_drafter,
    tiny_primary,
)
from tests.scripted_link import MISBEHAVIOURS, Clock, Life, ScriptedLink, block, misbehaviour, oracle

SAMPLED = SamplingParams(temperature=0.8, top_p=0.97, seed=11)


def plain_texts(requests: Iterable[GenerationRequest]) -> dict[str, tuple[int, ...]]:
    """Each request's tokens without any drafter."""
    return {name: output.token_ids for name, output in generate(make_engine(), requests).items()}


def local_engine(kind: str, config: PrimaryEngineConfig | None = None, **options: object) -> TorchPrimary:
    drafter = make_drafter_engine(kind)
    engine = make_engine(config, link_factory=local_link_factory({"d": drafter}, synchronous=True), **options)
    engine.set_drafters(["d"])
    return engine


def scripted_engine(link: ScriptedLink, config: PrimaryEngineConfig | None = None) -> tuple[TorchPrimary, Clock]:
    clock = Clock()
    engine = make_engine(config, link_factory=link, clock=clock)
    engine.set_drafters(["scripted"])
    return engine, clock


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tandem", "plain"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_families_and_drafters_are_lossless_and_drafts_are_accepted(
    family: str, kind: str, sampling: SamplingParams
) -> None:
    model = FAMILIES[family]
    drafter = make_drafter_engine(kind, model=model)
    engine = make_engine(model=model, link_factory=local_link_factory({"d": drafter}, synchronous=True))
    engine.set_drafters(["d"])
    requests = [a_request(f"r{i}", range(3, 20 + i), 24, replace(sampling, seed=i)) for i in range(3)]
    outputs = generate(engine, requests)
    plain = generate(make_engine(model=model), requests)
    assert {name: output.token_ids for name, output in outputs.items()} == {
        name: output.token_ids for name, output in plain.items()
    }
    assert sum(output.num_accepted_tokens for output in outputs.values()) > 20
    assert all(step.num_accepted_tokens <= step.num_draft_tokens for o in outputs.values() for step in o.steps)


@settings(max_examples=40)
@given(data=st.data())
def test_any_batch_block_lengths_and_chunks_are_lossless(data: st.DataObject) -> None:
    requests = []
    for i in range(data.draw(st.integers(1, 4), "sequences")):
        sampling = data.draw(st.sampled_from([GREEDY, SAMPLED, SamplingParams(top_k=20), SamplingParams(min_p=0.05)]))
        requests.append(
            a_request(
                f"r{i}",
                data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40), "prompt"),
                data.draw(st.integers(1, 20), "max_tokens"),
                replace(sampling, seed=data.draw(st.integers(-(2**63), 2**63 - 1), "seed")),
                block_length=data.draw(st.one_of(st.none(), st.integers(0, 8)), "block_length"),
                policy=(policy := data.draw(st.one_of(st.none(), st.sampled_from(PolicyName)), "policy")),
                threshold=None
                if policy in (None, PolicyName.FIXED)
                else data.draw(st.one_of(st.none(), st.floats(0, 1)), "threshold"),
            )
        )
    config = PrimaryEngineConfig(
        max_num_batched_tokens=data.draw(st.integers(16, 64), "chunk"),
        max_num_seqs=data.draw(st.integers(1, 4), "max_num_seqs"),
        block_length=data.draw(st.integers(0, 8), "default block length"),
    )
    outputs = generate(local_engine(data.draw(st.sampled_from(["tandem", "plain", "last"])), config), requests)
    assert {name: output.token_ids for name, output in outputs.items()} == plain_texts(requests)


@pytest.mark.parametrize("policy", [p for p in PolicyName if p is not PolicyName.FIXED])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_adaptive_policies_are_lossless_and_end_blocks_early(policy: PolicyName, sampling: SamplingParams) -> None:
    """Eight sequences of one batch, each with a threshold of its own."""
    requests = [
        a_request(f"r{i}", range(3, 12 + i), 40, replace(sampling, seed=i), policy=policy, threshold=i / 8)
        for i in range(8)
    ]
    outputs = generate(local_engine("tandem"), requests)
    assert {name: output.token_ids for name, output in outputs.items()} == plain_texts(requests)
    mean_lengths = [
        output.num_draft_tokens / sum(step.num_draft_tokens > 0 for step in output.steps) for output in outputs.values()
    ]
    assert mean_lengths[0] > 10  # nothing ends a block but its greatest length, 16
    assert mean_lengths[-1] < 4
    assert all(output.num_accepted_tokens > 5 for output in outputs.values())


@cache
def two_texts() -> list[tuple[list[GenerationRequest], dict[str, tuple[int, ...]]]]:
    """Two requests and their plain texts, greedy and sampled."""
    batches = [
        [a_request(f"r{i}", range(2, 6 + 9 * i), 30, replace(sampling, seed=i)) for i in range(2)]
        for sampling in (GREEDY, SAMPLED)
    ]
    return [(requests, plain_texts(requests)) for requests in batches]


@settings(max_examples=50)
@given(data=st.data())
def test_no_drafter_can_change_a_token(data: st.DataObject) -> None:
    """Rounds are answered rightly, wrongly, twice, late, never; sequences are rejected, drafters die, credit ends."""
    requests, plain = data.draw(st.sampled_from(two_texts()))
    right = oracle({r.request_id: r.prompt_token_ids + plain[r.request_id] for r in requests})
    kinds = itertools.cycle(data.draw(st.lists(st.sampled_from(MISBEHAVIOURS), min_size=1, max_size=12), "kinds"))

    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> object:
        return misbehaviour(next(kinds), right, VOCAB_SIZE)(link, life, command)

    kind = data.draw(st.sampled_from(["tandem", "plain"]))
    credit = data.draw(st.sampled_from([None, 700, 2000]))
    link = ScriptedLink(tiny_drafter(kind)[1], script, credit_bytes=credit)  # type: ignore[arg-type]
    engine, clock = scripted_engine(link, PrimaryEngineConfig(max_num_batched_tokens=16, block_length=4))
    outputs = {r.request_id: Output() for r in requests}
    for request in requests:
        engine.submit(request, outputs[request.request_id])
    drive(engine, clock)
    assert {name: output.token_ids for name, output in outputs.items()} == plain


def test_right_drafts_are_all_accepted_and_counted() -> None:
    request = a_request(max_tokens=25)
    plain = plain_texts([request])["r"]
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": request.prompt_token_ids + plain}))
    engine, _ = scripted_engine(link, PrimaryEngineConfig(block_length=5))
    output = generate(engine, [request])["r"]
    assert output.token_ids == plain
    assert [len(step.token_ids) for step in output.steps] == [1, 6, 6, 6, 6]
    assert [step.num_accepted_tokens for step in output.steps] == [0, 5, 5, 5, 5]
    value = engine.metrics.registry.get_sample_value
    assert value("vllm:spec_decode_num_drafts_total") == 4
    assert value("vllm:spec_decode_num_draft_tokens_total") == 20
    assert value("vllm:spec_decode_num_accepted_tokens_total") == 20
    per_position = [value("vllm:spec_decode_num_accepted_tokens_per_pos_total", {"position": str(i)}) for i in range(6)]
    assert per_position == [4, 4, 4, 4, 4, None]


def test_no_drafts_are_asked_for_beyond_the_last_token() -> None:
    request = a_request(max_tokens=9)
    plain = plain_texts([request])["r"]
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": request.prompt_token_ids + plain}))
    engine, _ = scripted_engine(link, PrimaryEngineConfig(block_length=5))
    output = generate(engine, [request])["r"]
    assert output.token_ids == plain
    assert [step.num_draft_tokens for step in output.steps] == [0, 5, 1]  # 1 + 6 + 2 tokens


def test_a_stop_id_among_the_drafts_ends_the_text_there() -> None:
    request = a_request(max_tokens=25)
    plain = plain_texts([request])["r"]
    stop = plain[4]
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": request.prompt_token_ids + plain}))
    engine, _ = scripted_engine(link, PrimaryEngineConfig(block_length=8))
    output = generate(engine, [replace(request, stop_token_ids=(stop,))])["r"]
    end = plain.index(stop) + 1
    assert output.token_ids == plain[:end]
    assert output.finish_reason is FinishReason.STOP
    assert output.num_accepted_tokens == end - 1
    assert link.closed == ["r"]


def test_logprobs_do_not_depend_on_drafts() -> None:
    request = a_request(max_tokens=15, sampling=SAMPLED, num_logprobs=2)
    plain = generate(make_engine(), [request])["r"]
    drafted = generate(local_engine("tandem"), [request])["r"]
    assert drafted.num_accepted_tokens > 0
    assert [(entry.token_id, [i for i, _ in entry.top]) for entry in drafted.logprobs] == [
        (entry.token_id, [i for i, _ in entry.top]) for entry in plain.logprobs
    ]
    assert [e.logprob for e in drafted.logprobs] == pytest.approx([e.logprob for e in plain.logprobs], abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_near_ties_are_settled_alike_with_drafts(sampling: SamplingParams) -> None:
    """Every choice is taken for a near tie: drafted or not, each token then comes from the same canonical pass."""
    request = a_request(max_tokens=20, sampling=sampling)
    output = generate(local_engine("tandem", tie_margin=1e9), [request])["r"]
    assert output.num_accepted_tokens > 0
    assert output.token_ids == reference_tokens(tiny_primary()[0], request)


def test_restart_on_another_replica_with_another_drafter_continues_the_text() -> None:
    request = a_request(max_tokens=24, sampling=SAMPLED)
    whole = plain_texts([request])["r"]
    for cut in (1, 8, 20):
        rest = a_request("r", request.prompt_token_ids + whole[:cut], 24 - cut, SAMPLED, block_length=3)
        for kind in ("tandem", "plain"):
            assert whole[:cut] + generate(local_engine(kind), [rest])["r"].token_ids == whole


def test_representations_are_the_primarys_taps() -> None:
    """All that a drafter was sent, in order, equals the hidden states of one whole pass."""
    decoder, _, _ = tiny_primary()
    request = a_request("r", range(5, 45), 20)
    plain = plain_texts([request])["r"]
    text = request.prompt_token_ids + plain
    link = ScriptedLink(tiny_drafter()[1], misbehaviour("half wrong", oracle({"r": text}), VOCAB_SIZE))
    engine, _ = scripted_engine(link, PrimaryEngineConfig(max_num_batched_tokens=16))
    engine.submit(request, output := Output())
    sent: list[torch.Tensor] = []
    while engine.has_work:
        engine.step()
        sent = link.lives["r"].representations if "r" in link.lives else sent
    assert output.token_ids == plain
    states = torch.cat(sent)
    assert len(states) > 50
    with torch.inference_mode():
        tokens = torch.tensor([text[: len(states)]])
        positions = torch.arange(len(states))
        assert link.info is not None
        expected = decoder(tokens, positions, causal_attention(CONFIG, len(states)), link.info.taps).taps
    torch.testing.assert_close(states, torch.stack([tap[0] for tap in expected], 1), rtol=1e-4, atol=1e-4)


class RecordingPolicy(RequestedPolicy):
    """Keeps what the engine tells."""

    def __init__(self) -> None:
        super().__init__(default=2)
        self.steps: list[StepSize] = []
        self.rounds: list[Round] = []

    def observe_step(self, size: StepSize, seconds: float) -> None:
        self.steps.append(size)

    def observe_round(self, request: GenerationRequest, outcome: Round) -> None:
        self.rounds.append(outcome)


def test_a_policy_is_told_what_else_the_step_ran_that_verified_a_round() -> None:
    policy = RecordingPolicy()
    engine = local_engine("tandem", PrimaryEngineConfig(max_num_batched_tokens=64), policy=policy)
    engine.submit(a_request("a", range(3, 12), 24), Output())
    engine.submit(a_request("b", range(5, 16), 24), Output())
    for _ in range(4):
        engine.step()
    together = policy.rounds[-1].step
    assert together == step_of(2, 2)
    engine.submit(a_request("c", range(4, 44), 4), Output())
    engine.step()
    beside_prompt = policy.rounds[-1].step
    assert beside_prompt == StepSize(num_draft_steps=2, num_sequences=3, num_tokens=6 + 40, has_prompts=True)
    assert policy.steps[-2:] == [together, beside_prompt]


def test_prompt_chunks_are_streamed_while_prefill_goes_on() -> None:
    link = ScriptedLink(tiny_drafter()[1], lambda link, life, command: [block(life, command, ())])
    engine, _ = scripted_engine(link, PrimaryEngineConfig(max_num_batched_tokens=16))
    engine.submit(a_request("r", range(5, 45), 4), Output())
    for num_sent in (16, 32):
        engine.step()
        assert len(link.lives["r"].token_ids) == num_sent
        assert link.lives["r"].rounds == []
    engine.step()
    assert len(link.lives["r"].token_ids) == 40
    assert [command.block_length for command in link.lives["r"].rounds] == [2]


def test_what_is_ready_is_verified_without_the_rest() -> None:
    """Of two sequences one gets its drafts: it runs on, while the other waits for its deadline."""
    requests = [a_request(name, max_tokens=30) for name in ("fast", "slow")]
    plain = plain_texts(requests)
    right = oracle({r.request_id: r.prompt_token_ids + plain[r.request_id] for r in requests})

    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> object:
        return right(link, life, command) if life.opened.sequence_id == "fast" else []

    link = ScriptedLink(tiny_drafter()[1], script)  # type: ignore[arg-type]
    engine, clock = scripted_engine(link)
    outputs = {r.request_id: Output() for r in requests}
    for request in requests:
        engine.submit(request, outputs[request.request_id])
    while engine.step():
        pass
    assert outputs["fast"].token_ids == plain["fast"]
    assert len(outputs["slow"].token_ids) == 1
    drive(engine, clock)
    assert outputs["slow"].token_ids == plain["slow"]


@settings(max_examples=20)
@given(
    logits=st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5),
    drift=st.integers(0, 2**31),
)
def test_margins_bound_what_drift_can_change(logits: list[list[float]], drift: int) -> None:
    """The premise of canonical.py: logits that move by less than half the margin choose the same token."""
    exact = torch.tensor(logits)
    rows = SamplingRows.from_params([(replace(SAMPLED, top_p=1.0), i) for i in range(len(logits))])
    choice = choose_token_ids(exact, rows)
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(drift)) - 0.5
    moved = choose_token_ids(exact + 0.98 * noise * choice.margins.float()[:, None].clamp(max=100), rows)
    clear = choice.margins > 1e-5
    assert torch.equal(choice.token_ids[clear], moved.token_ids[clear])
