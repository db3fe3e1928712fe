"""Records to messages and back, and the checks on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem_serve.errors import InvalidRequest
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import control_pb2, drafting_pb2, inference_pb2, tensor_pb2
from tandem_serve.rpc.convert_drafting import commands_request, events_response, parse_commands, parse_events
from tandem_serve.rpc.convert_handshake import (
    DrafterTerms,
    drafter_hello,
    parse_drafter_hello,
    parse_primary_hello,
    primary_hello,
)
from tandem_serve.rpc.convert_inference import (
    generate_request,
    generate_response,
    list_models_response,
    parse_generate_request,
    parse_generate_response,
    parse_list_models_response,
)
from tandem_serve.rpc.convert_primary import (
    generate_tokens_request,
    generate_tokens_response,
    parse_generate_tokens_request,
    parse_generate_tokens_response,
    parse_primary_status_response,
    primary_status_response,
)
from tandem_serve.rpc.convert_tensor import WireDtype, decode_tensor, encode_tensor
from tandem_serve.types import (
    CloseSequence,
    CreditGranted,
    DecodingMode,
    DraftBlock,
    DrafterLoad,
    ExtendSequence,
    FinishReason,
    GenerationRequest,
    GenerationStep,
    ModelCard,
    PolicyName,
    PrimaryStatus,
    SamplingParams,
    SequenceRejected,
    StoppingRule,
    TextDelta,
    TextRequest,
    TextUsage,
    TokenLogprob,
    credit_cost_bytes,
)
from tests.scripted_drafter import DRAFTER, PRIMARY, extended, opened

TERMS = DrafterTerms(DRAFTER, "bf16", 1 << 20, 1 << 22)

ids = st.lists(st.integers(0, 99), max_size=5).map(tuple)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0, 1, exclude_max=True),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
)
logprobs = st.lists(
    st.builds(
        TokenLogprob,
        st.integers(0, 99),
        st.floats(-50, 0),
        st.lists(st.tuples(st.integers(0, 99), st.floats(-50, 0)), max_size=3).map(tuple),
    ),
    max_size=3,
).map(tuple)
finish_reasons = st.one_of(st.none(), st.sampled_from(FinishReason))

# ------------------------------------------------------------------ tensors


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["bf16", "f32", "int8"]),
    st.integers(0, 4),
    st.integers(0, 1 << 30),
)
def test_a_tensor_survives_the_wire(dtype: torch.dtype, wire: WireDtype, rows: int, seed: int) -> None:
    tensor = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    message = tensor_pb2.Tensor()
    encode_tensor(tensor, wire, message)
    got = decode_tensor(tensor_pb2.Tensor.FromString(message.SerializeToString()), wire, (rows, 2, 8), "t")
    assert got.shape == tensor.shape
    if wire == "int8":
        half_a_scale = tensor.float().abs().amax(-1, keepdim=True) / 127 * 0.501 if rows else tensor
        assert ((got - tensor.float()).abs() <= half_a_scale).all()
    else:
        assert torch.equal(got, tensor.to(torch.bfloat16 if wire == "bf16" else torch.float32))


def test_rows_of_zeros_stay_zero_in_int8() -> None:
    message = tensor_pb2.Tensor()
    encode_tensor(torch.zeros(2, 2, 8), "int8", message)
    assert not decode_tensor(message, "int8", (2, 2, 8), "t").any()


def test_a_strided_view_is_sent_in_its_own_order() -> None:
    tensor = torch.arange(48.0).view(3, 2, 8)[:, ::1, ::2].transpose(0, 1)
    message = tensor_pb2.Tensor()
    encode_tensor(tensor, "f32", message)
    assert torch.equal(decode_tensor(message, "f32", (2, 3, 4), "t"), tensor)


@pytest.mark.parametrize("wire", ["bf16", "f32", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_stop_at_the_door(wire: WireDtype, value: float) -> None:
    tensor = torch.ones(2, 2, 8)
    tensor[1, 0, 3] = value
    message = tensor_pb2.Tensor()
    encode_tensor(tensor, wire, message)
    with pytest.raises(InvalidRequest, match="not finite"):
        decode_tensor(message, wire, (2, 2, 8), "t")


@pytest.mark.parametrize("scales", [b"", b"\0" * 12, b"\0" * 20])
def test_int8_wants_a_scale_a_row(scales: bytes) -> None:
    message = tensor_pb2.Tensor()
    encode_tensor(torch.ones(2, 2, 8), "int8", message)
    message.scales = scales
    with pytest.raises(InvalidRequest, match=r"t\.scales") as caught:
        decode_tensor(message, "int8", (2, 2, 8), "t")
    assert caught.value.field == "t.scales"


# ------------------------------------------------------------------ the drafting stream


def test_hellos_survive_the_wire() -> None:
    assert parse_primary_hello(primary_hello(PRIMARY)) == PRIMARY
    assert parse_drafter_hello(drafter_hello(TERMS)) == TERMS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", ""),
        ("tokenizer_hash", ""),
        ("vocab_size", 0),
        ("vocab_size", 1 << 25),
        ("taps", [4, 2]),
        ("taps", [2, 2]),
        ("taps", [5000]),
        ("primary_hidden_size", 0),
        ("max_block_length", 0),
        ("max_block_length", 65),
        ("max_model_len", 0),
        ("representation_dtype", 9),
        ("initial_credit_bytes", 0),
        ("initial_credit_bytes", 1 << 50),
        ("max_message_bytes", 0),
    ],
)
def test_a_drafter_hello_is_checked_field_by_field(field: str, value: Any) -> None:
    message = drafter_hello(TERMS)
    message.hello.ClearField(field)  # type: ignore[arg-type]
    if isinstance(value, list):
        getattr(message.hello, field).extend(value)
    else:
        setattr(message.hello, field, value)
    with pytest.raises(InvalidRequest) as caught:
        parse_drafter_hello(message)
    assert caught.value.field == f"hello.{field}"


ADAPTIVE = st.sampled_from([policy for policy in PolicyName if policy is not PolicyName.FIXED])
shares = st.floats(0, 1)
stopping_rules = st.builds(StoppingRule, ADAPTIVE, st.one_of(st.none(), shares), shares, shares)


@given(
    samplings,
    ids,
    st.one_of(st.none(), st.integers(0, 99)),
    st.integers(0, 64),
    st.integers(1, 1 << 30),
    st.one_of(st.none(), stopping_rules),
)
def test_commands_survive_the_wire(
    sampling: SamplingParams,
    token_ids: tuple[int, ...],
    next_id: int | None,
    length: int,
    number: int,
    rule: StoppingRule | None,
) -> None:
    open_ = replace(opened(incarnation=number), sampling=sampling)
    extend = replace(
        extended("ä", number, number, number, token_ids, next_id),
        block_length=length,
        stopping=rule,
        num_unverified=length,
    )
    close = CloseSequence("c", number)
    sent = [open_, extend, close]
    data = commands_request(sent, "bf16").SerializeToString()
    parsed = parse_commands(fields.parse(drafting_pb2.DraftRequest, data).commands, TERMS)
    got = parsed.commands[1]
    assert isinstance(got, ExtendSequence)
    assert [parsed.commands[0], replace(got, representations=None), parsed.commands[2]] == [
        open_,
        replace(extend, representations=None),
        close,
    ]
    if token_ids:
        assert got.representations is not None and extend.representations is not None
        assert torch.equal(got.representations, extend.representations.bfloat16())
    assert parsed.rejections == []
    assert parsed.cost_bytes == sum(map(credit_cost_bytes, sent))
    assert parsed.waste_bytes == 0


@given(
    st.lists(st.builds(DraftBlock, st.text(min_size=1), st.integers(0, 9), st.integers(0, 9), ids), max_size=3),
    st.lists(st.builds(SequenceRejected, st.text(), st.integers(0, 9), st.text(), st.booleans()), max_size=3),
    st.lists(st.integers(1, 1 << 40), max_size=3),
)
def test_events_survive_the_wire(
    blocks: list[DraftBlock], rejections: list[SequenceRejected], credits: list[int]
) -> None:
    response = events_response([*map(CreditGranted, credits), *rejections, *blocks])
    got = parse_events(fields.parse(drafting_pb2.DraftResponse, response.SerializeToString()).events, 100)
    total = [CreditGranted(sum(credits))] if credits else []
    assert got == [*blocks, *rejections, *total]


@pytest.mark.parametrize("block", [{"draft_token_ids": [100]}, {"draft_token_ids": [1] * 65}])
def test_drafts_are_checked_too(block: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="draft_token_ids"):
        parse_events(drafting_pb2.DraftEvents(blocks=[block]), vocab_size=100)


# ------------------------------------------------------------------ the primary's service


policies = st.one_of(
    st.sampled_from([(None, None), (PolicyName.FIXED, None)]), st.tuples(ADAPTIVE, st.one_of(st.none(), shares))
)


@given(
    samplings,
    ids.filter(bool),
    ids,
    st.one_of(st.none(), st.integers(0, 20)),
    st.one_of(st.none(), st.just("h:1")),
    policies,
    st.sampled_from(DecodingMode),
)
def test_a_generation_request_survives_the_wire(
    sampling: SamplingParams,
    prompt: tuple[int, ...],
    stop: tuple[int, ...],
    number: int | None,
    address: str | None,
    policy: tuple[PolicyName | None, float | None],
    mode: DecodingMode,
) -> None:
    request = GenerationRequest("r", prompt, sampling, 7, stop, number, number, address)
    request = replace(request, policy=policy[0], threshold=policy[1], mode=mode)
    data = generate_tokens_request(request).SerializeToString()
    message = fields.parse(control_pb2.GenerateTokensRequest, data)
    assert parse_generate_tokens_request(message, vocab_size=100) == request


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"prompt_token_ids": ()}, "prompt_token_ids"),
        ({"prompt_token_ids": (100,)}, "prompt_token_ids"),
        ({"stop_token_ids": (100,)}, "stop_token_ids"),
        ({"stop_token_ids": (1,) * 1025}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"num_logprobs": 1025}, "num_logprobs"),
        ({"block_length": 65}, "block_length"),
        ({"threshold": 0.5}, "threshold"),
        ({"policy": PolicyName.ROUTER, "threshold": 1.5}, "threshold"),
        ({"sampling": SamplingParams(temperature=-1)}, "sampling.temperature"),
        ({"sampling": SamplingParams(top_p=0)}, "sampling.top_p"),
        ({"sampling": SamplingParams(min_p=1)}, "sampling.min_p"),
        ({"drafter_address": "x" * 600}, "drafter_address"),
    ],
)
def test_a_generation_request_is_checked_field_by_field(change: dict[str, Any], field: str) -> None:
    request = replace(GenerationRequest("r", (1,), SamplingParams(), 7), **change)
    with pytest.raises(InvalidRequest, match=field):
        parse_generate_tokens_request(generate_tokens_request(request), vocab_size=100)


@given(ids, st.integers(0, 5), st.integers(0, 5), logprobs, finish_reasons)
def test_a_generation_step_survives_the_wire(
    token_ids: tuple[int, ...], accepted: int, drafted: int, found: Any, reason: FinishReason | None
) -> None:
    step = GenerationStep("r", token_ids, accepted, drafted, found, reason)
    data = generate_tokens_response(step).SerializeToString()
    message = fields.parse(control_pb2.GenerateTokensResponse, data)
    assert parse_generate_tokens_response(message, "r") == step


def test_a_status_survives_the_wire() -> None:
    links = tuple((f"h:{i}", state) for i, state in enumerate(["connecting", "ready", "refused", "closed"]))
    loads = tuple(DrafterLoad(address, i, i * 0.125 or None) for i, (address, _) in enumerate(links))
    status = PrimaryStatus(3, 4, 0.5, links, loads)
    data = primary_status_response(PRIMARY, status).SerializeToString()
    message = fields.parse(control_pb2.GetPrimaryStatusResponse, data)
    assert parse_primary_status_response(message) == (PRIMARY, status)


# ------------------------------------------------------------------ the public service

REQUEST = TextRequest("r", "model", "prompt")
text_requests = st.builds(
    TextRequest,
    request_id=st.just("r"),
    model=st.text(max_size=10),
    prompt=st.one_of(st.text(), ids.filter(bool)),
    max_tokens=st.one_of(st.none(), st.integers(1, 1 << 30)),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 1 << 20),
    min_p=st.floats(0, 1, exclude_max=True),
    seed=st.one_of(st.none(), st.integers(-(1 << 63), (1 << 63) - 1)),
    n=st.integers(1, 128),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=4).map(tuple),
    stop_token_ids=ids,
    ignore_eos=st.booleans(),
    logprobs=st.one_of(st.none(), st.integers(0, 100)),
    block_length=st.one_of(st.none(), st.integers(0, 64)),
)


@given(text_requests, policies, st.sampled_from(DecodingMode))
def test_a_text_request_survives_the_wire_but_for_its_id(request: TextRequest, policy: Any, mode: DecodingMode) -> None:
    request = replace(request, policy=policy[0], threshold=policy[1], mode=mode)
    message = fields.parse(inference_pb2.GenerateRequest, generate_request(request).SerializeToString())
    got = parse_generate_request(message)
    assert replace(got, request_id="r") == request
    assert got.request_id != parse_generate_request(message).request_id


def test_what_a_client_leaves_out_has_openai_s_defaults() -> None:
    got = parse_generate_request(inference_pb2.GenerateRequest(text="hello"))
    assert replace(got, request_id="r") == TextRequest("r", "", "hello")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "x" * 600}, "model"),
        ({"prompt": ()}, "token_ids"),
        ({"prompt": (1 << 25,)}, "token_ids"),
        ({"prompt": "x" * (5 << 20)}, "text"),
        ({"max_tokens": 1 << 31}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 1 << 31}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ("",)}, "stop[0]"),
        ({"stop": ("a",) * 17}, "the number of stop strings"),
        ({"stop_token_ids": (1,) * 1025}, "the number of stop_token_ids"),
        ({"logprobs": 101}, "logprobs"),
        ({"block_length": 65}, "speculation.block_length"),
        ({"threshold": 0.5}, "speculation.threshold"),
        ({"policy": PolicyName.FIXED, "threshold": 0.5}, "speculation.threshold"),
        ({"policy": PolicyName.ENTROPY, "threshold": float("nan")}, "speculation.threshold"),
    ],
)
def test_a_text_request_is_checked_field_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_generate_request(generate_request(replace(REQUEST, **change)))
    assert caught.value.field == field


def test_a_block_length_may_stand_inside_or_outside_of_speculation_but_not_both() -> None:
    message = inference_pb2.GenerateRequest(text="x", block_length=3)
    assert parse_generate_request(message).block_length == 3
    message.speculation.block_length = 3
    with pytest.raises(InvalidRequest, match="twice"):
        parse_generate_request(message)


@pytest.mark.parametrize("field", ["policy", "mode"])
def test_an_unknown_policy_or_mode_is_named(field: str) -> None:
    message = inference_pb2.GenerateRequest(text="x", speculation={field: 9})
    with pytest.raises(InvalidRequest) as caught:
        parse_generate_request(message)
    assert caught.value.field == f"speculation.{field}"


def test_blocks_that_nobody_verifies_may_be_as_long_as_they_like() -> None:
    long = replace(REQUEST, block_length=1000, mode=DecodingMode.TANDEM)
    assert parse_generate_request(generate_request(long)).block_length == 1000
    with pytest.raises(InvalidRequest):
        parse_generate_request(generate_request(replace(long, mode=DecodingMode.SPECULATIVE)))


def test_a_prompt_is_needed() -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        parse_generate_request(inference_pb2.GenerateRequest())


@given(
    st.builds(
        TextDelta,
        index=st.integers(0, 9),
        text=st.text(),
        token_ids=ids,
        num_accepted_tokens=st.integers(0, 9),
        num_draft_tokens=st.integers(0, 9),
        num_accepted_chars=st.integers(0, 9),
        logprobs=logprobs,
        finish_reason=finish_reasons,
        usage=st.one_of(st.none(), st.builds(TextUsage, *[st.integers(0, 9)] * 5)),
    )
)
def test_a_text_delta_survives_the_wire(delta: TextDelta) -> None:
    data = generate_response(delta).SerializeToString()
    assert parse_generate_response(fields.parse(inference_pb2.GenerateResponse, data)) == delta


def test_models_survive_the_wire() -> None:
    cards = [ModelCard("a", 1), ModelCard("b", 2)]
    assert parse_list_models_response(list_models_response(cards)) == cards
