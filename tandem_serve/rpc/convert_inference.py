"""The public service's messages to and from the text-level records. Needs no torch.

Limits here are what no router goes beyond; the router's own (config.RouterLimits) are the TextService's to check.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from tandem_serve.errors import InvalidRequest
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import inference_pb2
from tandem_serve.rpc.convert_primary import (
    FINISH_REASONS,
    MAX_STOP_TOKEN_IDS,
    MAX_VOCAB_SIZE,
    MODES,
    POLICIES,
    fill_logprobs,
    parse_block_length,
    parse_finish_reason,
    parse_logprobs,
    parse_mode,
    parse_policy,
)
from tandem_serve.rpc.statuses import REQUEST_ID_KEY
from tandem_serve.types import DecodingMode, ModelCard, TextDelta, TextRequest, TextUsage

MAX_TEXT_BYTES = 4 << 20  # of a prompt
MAX_TEMPERATURE = 2.0
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024  # of one stop string
MAX_LOGPROBS = 100
DEFAULTS = TextRequest(request_id="", model="", prompt="")
DEFAULT_MAX_TOKENS = 16
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@=+/-]{1,64}")

T = TypeVar("T")


def parse_generate_request(message: inference_pb2.GenerateRequest) -> TextRequest:
    """Raises InvalidRequest naming the field. The request gets an id of its own."""

    def given(name: str, default: T) -> T:
        value: T = getattr(message, name) if message.HasField(name) else default
        return value

    stop = tuple(fields.text(text, f"stop[{i}]", max_bytes=MAX_STOP_BYTES) for i, text in enumerate(message.stop))
    fields.integer(len(stop), "the number of stop strings", high=MAX_STOP_STRINGS)
    stop_ids = fields.token_ids(message.stop_token_ids, "stop_token_ids", vocab_size=MAX_VOCAB_SIZE)
    fields.integer(len(stop_ids), "the number of stop_token_ids", high=MAX_STOP_TOKEN_IDS)
    logprobs: int | None = given("logprobs", None)
    fields.integer(logprobs or 0, "logprobs", high=MAX_LOGPROBS)
    policy, threshold = parse_policy(message.speculation, "speculation.")
    mode = parse_mode(message.speculation.mode, "speculation.")
    temperature = given("temperature", DEFAULTS.temperature)
    return TextRequest(
        request_id=f"gen-{secrets.token_hex(12)}",
        model=fields.text(message.model, "model", max_bytes=fields.MAX_NAME_BYTES, required=False),
        prompt=_parse_prompt(message),
        max_tokens=fields.integer(given("max_tokens", DEFAULT_MAX_TOKENS), "max_tokens", high=fields.MAX_POSITION)
        or None,
        temperature=fields.real(temperature, "temperature", low=0, high=MAX_TEMPERATURE),
        top_p=fields.real(given("top_p", DEFAULTS.top_p), "top_p", low=0, high=1, without_low=True),
        top_k=fields.integer(message.top_k, "top_k", high=fields.MAX_POSITION),
        min_p=fields.real(message.min_p, "min_p", low=0, high=1, without_high=True),
        seed=given("seed", None),
        n=fields.integer(given("n", DEFAULTS.n), "n", low=1, high=MAX_N),
        stop=stop,
        stop_token_ids=stop_ids,
        ignore_eos=message.ignore_eos,
        logprobs=logprobs,
        block_length=_parse_block_length(message, mode),
        policy=policy,
        threshold=threshold,
        mode=mode,
    )


def _parse_block_length(message: inference_pb2.GenerateRequest, mode: DecodingMode) -> int | None:
    inner, outer = message.speculation.HasField("block_length"), message.HasField("block_length")
    if inner and outer:
        raise InvalidRequest("block_length is given twice", field="speculation.block_length")
    if inner:
        return parse_block_length(message.speculation.block_length, mode, "speculation.block_length")
    return parse_block_length(message.block_length, mode, "block_length") if outer else None


def name_of_call(metadata: Iterable[Any]) -> str:
    """The client's own name for its request, or a new one where there is none or one that no log should hold."""
    given = next((value for key, value in metadata if key == REQUEST_ID_KEY), None)
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def with_metadata(request: TextRequest, name: str, metadata: Iterable[Any]) -> TextRequest:
    """The request with its call's name and the trace that the metadata tell."""
    request_id = f"gen-{name}-{secrets.token_hex(4)}"  # clients may use a name twice, engines may not
    traceparent = next((value for key, value in metadata if key == "traceparent" and isinstance(value, str)), None)
    return replace(request, request_id=request_id, traceparent=traceparent)


def _parse_prompt(message: inference_pb2.GenerateRequest) -> str | tuple[int, ...]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("a prompt is missing: set text or token_ids", field="prompt")
    if kind == "text":
        return fields.text(message.text, "text", max_bytes=MAX_TEXT_BYTES, required=False)
    return fields.token_ids(message.token_ids.ids, "token_ids", vocab_size=MAX_VOCAB_SIZE, required=True)


def generate_request(request: TextRequest) -> inference_pb2.GenerateRequest:
    """request_id does not travel: the server makes its own."""
    prompt = request.prompt
    speculation = inference_pb2.Speculation(
        block_length=request.block_length,
        policy=POLICIES[request.policy] if request.policy else None,
        threshold=request.threshold,
        mode=MODES[request.mode],
    )
    return inference_pb2.GenerateRequest(
        model=request.model,
        text=prompt if isinstance(prompt, str) else None,
        token_ids=None if isinstance(prompt, str) else inference_pb2.TokenIds(ids=prompt),
        max_tokens=request.max_tokens or 0,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        n=request.n,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
        speculation=speculation,
    )


def generate_response(delta: TextDelta) -> inference_pb2.GenerateResponse:
    message = inference_pb2.GenerateResponse(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        num_accepted_tokens=delta.num_accepted_tokens,
        num_draft_tokens=delta.num_draft_tokens,
        num_accepted_chars=delta.num_accepted_chars,
        finish_reason=FINISH_REASONS[delta.finish_reason] if delta.finish_reason else None,
    )
    fill_logprobs(delta.logprobs, message.logprobs)
    if delta.usage is not None:
        usage = delta.usage
        message.usage.prompt_tokens = usage.prompt_tokens
        message.usage.completion_tokens = usage.completion_tokens
        message.usage.num_drafts = usage.num_drafts
        message.usage.num_draft_tokens = usage.num_draft_tokens
        message.usage.num_accepted_tokens = usage.num_accepted_tokens
    return message


def parse_generate_response(message: inference_pb2.GenerateResponse) -> TextDelta:
    usage = None
    if message.HasField("usage"):
        usage = TextUsage(
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            num_drafts=message.usage.num_drafts,
            num_draft_tokens=message.usage.num_draft_tokens,
            num_accepted_tokens=message.usage.num_accepted_tokens,
        )
    return TextDelta(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        num_accepted_tokens=message.num_accepted_tokens,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_chars=message.num_accepted_chars,
        logprobs=parse_logprobs(message.logprobs),
        finish_reason=parse_finish_reason(message.finish_reason),
        usage=usage,
    )


def list_models_response(cards: Iterable[ModelCard]) -> inference_pb2.ListModelsResponse:
    return inference_pb2.ListModelsResponse(
        models=[inference_pb2.Model(id=card.id, max_model_len=card.max_model_len) for card in cards]
    )


def parse_list_models_response(message: inference_pb2.ListModelsResponse) -> list[ModelCard]:
    return [ModelCard(model.id, model.max_model_len) for model in message.models]
