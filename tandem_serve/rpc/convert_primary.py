"""The records of the primary's token-level service to and from control.proto. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tandem_serve.errors import InvalidRequest
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import control_pb2, drafting_pb2, inference_pb2
from tandem_serve.types import (
    MAX_BLOCK_LENGTH,
    DecodingMode,
    DrafterLoad,
    FinishReason,
    GenerationRequest,
    GenerationStep,
    PolicyName,
    PrimaryInfo,
    PrimaryStatus,
    SamplingParams,
    TokenLogprob,
)

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

MAX_VOCAB_SIZE = 1 << 24
MAX_HIDDEN_SIZE = 1 << 20
MAX_LAYERS = 4096
MAX_TEMPERATURE = 100.0

MAX_LOGPROBS = 1024
MAX_STOP_TOKEN_IDS = 1024

FINISH_REASONS = {
    FinishReason.STOP: control_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: control_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: control_pb2.FINISH_REASON_ABORT,
}
_REASONS: dict[int, FinishReason] = {number: reason for reason, number in FINISH_REASONS.items()}
POLICIES = {
    PolicyName.FIXED: drafting_pb2.BLOCK_POLICY_FIXED,
    PolicyName.ENTROPY: drafting_pb2.BLOCK_POLICY_ENTROPY,
    PolicyName.ROUTER: drafting_pb2.BLOCK_POLICY_ROUTER,
    PolicyName.OPTIMAL: drafting_pb2.BLOCK_POLICY_OPTIMAL,
}
MODES = {
    DecodingMode.PLAIN: control_pb2.DECODING_MODE_PLAIN,
    DecodingMode.SPECULATIVE: control_pb2.DECODING_MODE_SPECULATIVE,
    DecodingMode.TANDEM: control_pb2.DECODING_MODE_TANDEM,
    DecodingMode.TANDEM_REPRESENTATIONS: control_pb2.DECODING_MODE_TANDEM_REPRESENTATIONS,
}
_MODE_NAMES: dict[int, DecodingMode] = {number: mode for mode, number in MODES.items()}
_POLICY_NAMES: dict[int, PolicyName] = {number: name for name, number in POLICIES.items()}
_LINK_STATES = {
    "connecting": control_pb2.LINK_STATE_CONNECTING,
    "ready": control_pb2.LINK_STATE_READY,
    "refused": control_pb2.LINK_STATE_REFUSED,
    "closed": control_pb2.LINK_STATE_CLOSED,
}
_STATE_NAMES: dict[int, str] = {number: name for name, number in _LINK_STATES.items()}

# ------------------------------------------------------------------ parts that other messages share


def primary_model(info: PrimaryInfo) -> drafting_pb2.PrimaryModel:
    return drafting_pb2.PrimaryModel(
        model=info.model,
        fingerprint=info.fingerprint,
        tokenizer_hash=info.tokenizer_hash,
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        num_layers=info.num_layers,
        max_model_len=info.max_model_len,
    )


def parse_primary_model(message: drafting_pb2.PrimaryModel, field: str) -> PrimaryInfo:
    def name(value: str, part: str) -> str:
        return fields.text(value, f"{field}.{part}", max_bytes=fields.MAX_NAME_BYTES, required=part != "model")

    def size(value: int, part: str, high: int) -> int:
        return fields.integer(value, f"{field}.{part}", low=1, high=high)

    return PrimaryInfo(
        model=name(message.model, "model"),
        fingerprint=name(message.fingerprint, "fingerprint"),
        tokenizer_hash=name(message.tokenizer_hash, "tokenizer_hash"),
        vocab_size=size(message.vocab_size, "vocab_size", MAX_VOCAB_SIZE),
        hidden_size=size(message.hidden_size, "hidden_size", MAX_HIDDEN_SIZE),
        num_layers=size(message.num_layers, "num_layers", MAX_LAYERS),
        max_model_len=size(message.max_model_len, "max_model_len", fields.MAX_POSITION),
    )


def fill_sampling(params: SamplingParams, out: drafting_pb2.Sampling) -> None:
    out.temperature = params.temperature
    out.top_p = params.top_p
    out.top_k = params.top_k
    out.min_p = params.min_p
    out.seed = params.seed


def parse_sampling(message: drafting_pb2.Sampling, field: str) -> SamplingParams:
    return SamplingParams(
        temperature=fields.real(message.temperature, f"{field}.temperature", low=0, high=MAX_TEMPERATURE),
        top_p=fields.real(message.top_p, f"{field}.top_p", low=0, high=1, without_low=True),
        top_k=fields.integer(message.top_k, f"{field}.top_k", high=fields.MAX_POSITION),
        min_p=fields.real(message.min_p, f"{field}.min_p", low=0, high=1, without_high=True),
        seed=message.seed,
    )


def fill_logprobs(
    logprobs: Iterable[TokenLogprob], out: RepeatedCompositeFieldContainer[control_pb2.TokenLogprob]
) -> None:
    for logprob in logprobs:
        message = out.add(token_id=logprob.token_id, logprob=logprob.logprob)
        for token_id, value in logprob.top:
            message.top.add(token_id=token_id, logprob=value)


def parse_logprobs(messages: Iterable[control_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(message.token_id, message.logprob, tuple((top.token_id, top.logprob) for top in message.top))
        for message in messages
    )


def parse_finish_reason(number: int) -> FinishReason | None:
    if number == control_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    if number not in _REASONS:
        raise InvalidRequest(f"finish_reason {number} is unknown", field="finish_reason")
    return _REASONS[number]


def parse_policy(
    message: control_pb2.GenerateTokensRequest | inference_pb2.Speculation | drafting_pb2.StoppingRule, field: str = ""
) -> tuple[PolicyName | None, float | None]:
    """policy and threshold of a message; `field` is where it lies, with a dot behind it."""
    number = int(message.policy)
    if number and number not in _POLICY_NAMES:
        raise InvalidRequest(f"{field}policy {number} is unknown", field=f"{field}policy")
    policy = _POLICY_NAMES.get(number)
    if not message.HasField("threshold"):
        return policy, None
    if policy in (None, PolicyName.FIXED):
        raise InvalidRequest(f"{field}threshold needs a policy other than fixed", field=f"{field}threshold")
    return policy, fields.real(message.threshold, f"{field}threshold", low=0, high=1)


def parse_mode(number: int, field: str = "") -> DecodingMode:
    if number == control_pb2.DECODING_MODE_UNSPECIFIED:
        return DecodingMode.SPECULATIVE
    if number not in _MODE_NAMES:
        raise InvalidRequest(f"{field}mode {number} is unknown", field=f"{field}mode")
    return _MODE_NAMES[number]


def parse_block_length(value: int, mode: DecodingMode, field: str) -> int:
    """Drafts a round are limited; drafts that nobody verifies are not."""
    return fields.integer(value, field, high=fields.MAX_POSITION if mode.is_standalone else MAX_BLOCK_LENGTH)


# ------------------------------------------------------------------ generation


def generate_tokens_request(request: GenerationRequest) -> control_pb2.GenerateTokensRequest:
    message = control_pb2.GenerateTokensRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        num_logprobs=request.num_logprobs,
        block_length=request.block_length,
        drafter_address=request.drafter_address or "",
        traceparent=request.traceparent or "",
        policy=POLICIES[request.policy] if request.policy else None,
        threshold=request.threshold,
        mode=MODES[request.mode],
    )
    fill_sampling(request.sampling, message.sampling)
    return message


def parse_generate_tokens_request(message: control_pb2.GenerateTokensRequest, vocab_size: int) -> GenerationRequest:
    """Raises InvalidRequest naming the field. Lengths against the model's are the engine's business."""
    stop = fields.token_ids(message.stop_token_ids, "stop_token_ids", vocab_size=vocab_size)
    fields.integer(len(stop), "the number of stop_token_ids", high=MAX_STOP_TOKEN_IDS)
    mode = parse_mode(message.mode)
    num_logprobs = block_length = None
    if message.HasField("num_logprobs"):
        num_logprobs = fields.integer(message.num_logprobs, "num_logprobs", high=MAX_LOGPROBS)
    if message.HasField("block_length"):
        block_length = parse_block_length(message.block_length, mode, "block_length")
    address = fields.text(message.drafter_address, "drafter_address", max_bytes=fields.MAX_NAME_BYTES, required=False)
    policy, threshold = parse_policy(message)
    return GenerationRequest(
        request_id=fields.text(message.request_id, "request_id", max_bytes=fields.MAX_ID_BYTES),
        prompt_token_ids=fields.token_ids(
            message.prompt_token_ids, "prompt_token_ids", vocab_size=vocab_size, required=True
        ),
        sampling=parse_sampling(message.sampling, "sampling"),
        max_tokens=fields.integer(message.max_tokens, "max_tokens", low=1, high=fields.MAX_POSITION),
        stop_token_ids=stop,
        num_logprobs=num_logprobs,
        block_length=block_length,
        drafter_address=address or None,
        traceparent=fields.traceparent(message.traceparent),
        policy=policy,
        threshold=threshold,
        mode=mode,
    )


def generate_tokens_response(step: GenerationStep) -> control_pb2.GenerateTokensResponse:
    message = control_pb2.GenerateTokensResponse(
        token_ids=step.token_ids,
        num_accepted_tokens=step.num_accepted_tokens,
        num_draft_tokens=step.num_draft_tokens,
        finish_reason=FINISH_REASONS[step.finish_reason] if step.finish_reason else None,
    )
    fill_logprobs(step.logprobs, message.logprobs)
    return message


def parse_generate_tokens_response(message: control_pb2.GenerateTokensResponse, request_id: str) -> GenerationStep:
    return GenerationStep(
        request_id=request_id,
        token_ids=tuple(message.token_ids),
        num_accepted_tokens=message.num_accepted_tokens,
        num_draft_tokens=message.num_draft_tokens,
        logprobs=parse_logprobs(message.logprobs),
        finish_reason=parse_finish_reason(message.finish_reason),
    )


# ------------------------------------------------------------------ status


def primary_status_response(info: PrimaryInfo, status: PrimaryStatus) -> control_pb2.GetPrimaryStatusResponse:
    loads = {load.address: load for load in status.loads}
    return control_pb2.GetPrimaryStatusResponse(
        primary=primary_model(info),
        num_requests_running=status.num_requests_running,
        num_requests_waiting=status.num_requests_waiting,
        kv_cache_usage=status.kv_cache_usage,
        drafters=[_link_status(address, state, loads.get(address)) for address, state in status.drafters],
    )


def parse_primary_status_response(
    message: control_pb2.GetPrimaryStatusResponse,
) -> tuple[PrimaryInfo, PrimaryStatus]:
    return parse_primary_model(message.primary, "primary"), PrimaryStatus(
        num_requests_running=message.num_requests_running,
        num_requests_waiting=message.num_requests_waiting,
        kv_cache_usage=message.kv_cache_usage,
        drafters=tuple((link.address, _STATE_NAMES.get(link.state, "unknown")) for link in message.drafters),
        loads=tuple(
            DrafterLoad(link.address, link.num_sequences, link.wait_s if link.HasField("wait_s") else None)
            for link in message.drafters
        ),
    )


def _link_status(address: str, state: str, load: DrafterLoad | None) -> control_pb2.DrafterLinkStatus:
    return control_pb2.DrafterLinkStatus(
        address=address,
        state=_LINK_STATES[state],
        num_sequences=0 if load is None else load.num_sequences,
        wait_s=None if load is None else load.wait_s,
    )
