"""Standalone tandem: drafts are text, unverified, and the primary refreshes representations a block at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.canonical import canonical_logits
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.engine.torch_primary import TorchPrimary
from tandem_serve.errors import InvalidRequest
from tandem_serve.types import DecodingMode, FinishReason, GenerationRequest, PolicyName, SamplingParams
from tests.checkpoints import VOCAB_SIZE
from tests.drafter_peer import drafts_behind
from tests.engines import (
    GREEDY,
    Output,
    a_request,
    drive,
    generate,
    make_drafter_engine,
    make_engine,
    tiny_drafter,
    tiny_primary,
)
from tests.scripted_link import MISBEHAVIOURS, Clock, ScriptedLink, misbehaviour, oracle, silence

TANDEM, REPRESENTATIONS = DecodingMode.TANDEM, DecodingMode.TANDEM_REPRESENTATIONS
SAMPLED = SamplingParams(temperature=0.8, top_p=0.97, seed=11)
VARIANTS = pytest.mark.parametrize("mode", [TANDEM, REPRESENTATIONS])
SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def engine_with(kind: str = "tandem", config: PrimaryEngineConfig | None = None) -> TorchPrimary:
    drafter = make_drafter_engine(kind, DrafterEngineConfig())
    engine = make_engine(config, link_factory=local_link_factory({"d": drafter}, synchronous=True))
    engine.set_drafters(["d"])
    return engine


@torch.inference_mode()
def primary_token(text: list[int], sampling: SamplingParams) -> int:
    """What the primary writes behind a text."""
    rows = SamplingRows.from_params([(sampling, len(text))])
    return int(choose_token_ids(canonical_logits(tiny_primary()[0], text), rows).token_ids)


def reference(request: GenerationRequest, kind: str) -> tuple[int, ...]:
    """Standalone decoding as the paper has it: whole passes, block by block."""
    text, end = list(request.prompt_token_ids), len(request.prompt_token_ids) + request.max_tokens
    assert request.block_length
    while len(text) < end:
        if request.mode is TANDEM:
            text.append(primary_token(text, request.sampling))
        length = min(request.block_length, end - len(text))
        text += drafts_behind(text, length, request.sampling, kind)
    return tuple(text[len(request.prompt_token_ids) : end])


@VARIANTS
@SAMPLINGS
def test_gamma_zero_is_the_primary(mode: DecodingMode, sampling: SamplingParams) -> None:
    request = a_request(prompt=range(5, 25), max_tokens=20, sampling=sampling)
    plain = generate(make_engine(), [request])["r"].token_ids
    assert generate(engine_with(), [replace(request, mode=mode, block_length=0)])["r"].token_ids == plain


@SAMPLINGS
def test_gamma_infinity_is_the_drafter_behind_the_primary_s_prefill(sampling: SamplingParams) -> None:
    """40 tokens in rounds of the drafter's 16: it goes on behind its own tokens, without the primary."""
    request = a_request(prompt=range(5, 45), max_tokens=40, sampling=sampling, block_length=1_000_000)
    prompt = list(request.prompt_token_ids)
    only_drafts = generate(engine_with(), [replace(request, mode=REPRESENTATIONS)])["r"]
    assert only_drafts.token_ids == drafts_behind(prompt, 40, sampling)
    assert [len(step.token_ids) for step in only_drafts.steps] == [16, 16, 8]
    opened = generate(engine_with(), [replace(request, mode=TANDEM)])["r"]
    first = primary_token(prompt, sampling)
    assert opened.token_ids == (first, *drafts_behind([*prompt, first], 39, sampling))
    assert [len(step.token_ids) for step in opened.steps] == [1, 16, 16, 7]


@pytest.mark.parametrize("kind", ["tandem", "plain"])
@VARIANTS
def test_any_gamma_is_what_the_paper_says(mode: DecodingMode, kind: str) -> None:
    """All in one batch, greedy and sampled, beside a speculative sequence that stays lossless."""
    requests = [
        a_request(f"{gamma}-{i}", range(3, 4 + 9 * i), 26, sampling, mode=mode, block_length=gamma)
        for gamma in (1, 3, 20)
        for i, sampling in enumerate((GREEDY, SAMPLED))
    ]
    verified = a_request("verified", max_tokens=26)
    outputs = generate(engine_with(kind, PrimaryEngineConfig(max_num_batched_tokens=16)), [*requests, verified])
    for request in requests:
        assert outputs[request.request_id].token_ids == reference(request, kind), request.request_id
        assert outputs[request.request_id].finish_reason is FinishReason.LENGTH
    assert outputs["verified"].token_ids == generate(make_engine(), [verified])["verified"].token_ids


def test_the_primary_writes_one_token_a_block_or_none() -> None:
    request = a_request(max_tokens=12, block_length=3)
    opened = generate(engine_with(), [replace(request, mode=TANDEM)])["r"].steps
    assert [(len(s.token_ids), s.num_accepted_tokens) for s in opened] == [(1, 0), (3, 3)] * 3
    drafted = generate(engine_with(), [replace(request, mode=REPRESENTATIONS)])["r"].steps
    assert [(len(s.token_ids), s.num_accepted_tokens) for s in drafted] == [(3, 3)] * 4


def test_the_engine_s_block_length_is_the_default() -> None:
    config = PrimaryEngineConfig(block_length=2)
    steps = generate(engine_with(config=config), [a_request(max_tokens=9, mode=TANDEM)])["r"].steps
    assert [len(step.token_ids) for step in steps] == [1, 2, 1, 2, 1, 2]


def test_a_stop_id_among_the_drafts_ends_the_text() -> None:
    request = a_request(max_tokens=30, mode=TANDEM, block_length=7)
    text = reference(request, "tandem")
    stop = text[9]
    output = generate(engine_with(), [replace(request, stop_token_ids=(stop,))])["r"]
    assert output.token_ids == text[: text.index(stop) + 1]
    assert output.finish_reason is FinishReason.STOP


@VARIANTS
def test_without_a_drafter_the_primary_writes(mode: DecodingMode) -> None:
    request = a_request(max_tokens=15, mode=mode)
    plain = generate(make_engine(), [a_request(max_tokens=15)])["r"].token_ids
    assert generate(make_engine(), [request])["r"].token_ids == plain
    clock = Clock()
    engine = make_engine(link_factory=ScriptedLink(tiny_drafter()[1], silence), clock=clock)
    engine.set_drafters(["scripted"])
    engine.submit(request, output := Output())
    drive(engine, clock)
    assert output.token_ids == plain


@settings(max_examples=25)
@given(data=st.data())
def test_no_drafter_can_break_a_sequence(data: st.DataObject) -> None:
    """Whatever it answers, or does not, the sequence gets all its tokens, and those that exist only."""
    right = oracle({f"r{i}": [*range(2, 60)] * 3 for i in range(2)})
    kinds = itertools.cycle(data.draw(st.lists(st.sampled_from(MISBEHAVIOURS), min_size=1, max_size=12), "kinds"))
    link = ScriptedLink(
        tiny_drafter(data.draw(st.sampled_from(["tandem", "plain"])))[1],
        lambda link, life, command: misbehaviour(next(kinds), right, VOCAB_SIZE)(link, life, command),
        credit_bytes=data.draw(st.sampled_from([None, 700, 2000])),
    )
    clock = Clock()
    engine = make_engine(PrimaryEngineConfig(max_num_batched_tokens=16), link_factory=link, clock=clock)
    engine.set_drafters(["scripted"])
    outputs = [Output() for _ in range(2)]
    for i, output in enumerate(outputs):
        mode = data.draw(st.sampled_from([TANDEM, REPRESENTATIONS]), "mode")
        length = data.draw(st.sampled_from([1, 4, 30]), "gamma")
        engine.submit(a_request(f"r{i}", range(2, 6 + 20 * i), 25, mode=mode, block_length=length), output)
    drive(engine, clock)
    for output in outputs:
        assert len(output.token_ids) == 25 and not output.errors
        assert all(0 <= token_id < VOCAB_SIZE for token_id in output.token_ids)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"policy": PolicyName.ENTROPY}, "policy"),
        ({"num_logprobs": 1}, "num_logprobs"),
        ({"block_length": -1}, "block_length"),
    ],
)
def test_what_needs_verification_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_engine().submit(a_request(mode=TANDEM, **change), Output())
    assert caught.value.field == field


@VARIANTS
def test_a_block_that_outgrows_the_drafter_is_closed(mode: DecodingMode) -> None:
    """The drafter's last position falls inside a block: nothing more can be asked for, and the primary goes on."""
    model, info = tiny_drafter()
    drafter = DrafterEngine(model, replace(info, max_model_len=20), DrafterEngineConfig())
    engine = make_engine(link_factory=local_link_factory({"d": drafter}, synchronous=True))
    engine.set_drafters(["d"])
    output = Output()
    engine.submit(a_request(max_tokens=40, mode=mode, block_length=1000), output)
    while engine.has_work:
        assert engine.step(), f"it waits for ever behind {len(output.token_ids)} tokens"
    assert len(output.token_ids) == 40
    assert output.errors == []


@VARIANTS
def test_a_drafter_that_comes_takes_sequences_over_between_blocks_alone(mode: DecodingMode) -> None:
    model, info = tiny_drafter()
    info = replace(info, max_block_length=4)
    drafters = {name: DrafterEngine(model, info, DrafterEngineConfig()) for name in "abc"}
    engine, calm = (make_engine(link_factory=local_link_factory(drafters, synchronous=True)) for _ in range(2))
    calm.set_drafters(["c"])
    requests = [a_request(f"r{i}", range(4, 12 + i), 90, mode=mode, block_length=11) for i in range(4)]
    outputs = [Output() for _ in requests]
    engine.set_drafters(["a"])
    for request, output in zip(requests, outputs, strict=True):
        engine.submit(request, output)
    while min(len(output.token_ids) for output in outputs) < 15:
        engine.step()
    engine.set_drafters(["a", "b"])
    carried = set()
    while engine.has_work:
        engine.step()
        carried |= {load.num_sequences for load in engine.status().loads if load.address == "b"}
    assert max(carried) == 2
    expected = generate(calm, requests)
    assert all(output.token_ids == expected[f"r{i}"].token_ids for i, output in enumerate(outputs))
    if mode is TANDEM:
        assert outputs[0].token_ids == reference(requests[0], "tandem")
