"""What requests and commands must satisfy before an engine takes them in. Each complaint names the field."""

from __future__ import annotations

import math

import torch

from tandem_serve.errors import InvalidRequest
from tandem_serve.types import (
    MAX_BLOCK_LENGTH,
    DrafterInfo,
    ExtendSequence,
    GenerationRequest,
    OpenSequence,
    PolicyName,
    SamplingParams,
    StoppingRule,
)

MAX_REQUEST_ID_BYTES = 128  # sequence ids on the wire (drafting.proto)


def check_sampling(sampling: SamplingParams) -> None:
    """Raises InvalidRequest where a parameter is outside its range (SamplingParams), not a number, or infinite."""
    checks = (
        ("temperature", sampling.temperature, "0 to 100", 0 <= sampling.temperature <= 100),
        ("top_p", sampling.top_p, "above 0, at most 1", 0 < sampling.top_p <= 1),
        ("top_k", sampling.top_k, "0 (all) or more", 0 <= sampling.top_k < 1 << 32),
        ("min_p", sampling.min_p, "at least 0, below 1", 0 <= sampling.min_p < 1),
        ("seed", sampling.seed, "a signed 64-bit integer", -(1 << 63) <= sampling.seed < 1 << 63),
    )
    for field, value, expected, is_right in checks:
        if not is_right or not math.isfinite(value):
            raise InvalidRequest(f"{field} = {value!r}: expected {expected}", field=field)


def check_request(request: GenerationRequest, *, vocab_size: int, max_model_len: int, kv_cache_tokens: int) -> None:
    """Raises InvalidRequest where a request can never be served."""
    prompt = request.prompt_token_ids
    if not 0 < len(request.request_id.encode()) <= MAX_REQUEST_ID_BYTES:
        raise InvalidRequest(f"request_id must have 1 to {MAX_REQUEST_ID_BYTES} bytes", field="request_id")
    if not prompt:
        raise InvalidRequest("the prompt must have at least one token", field="prompt_token_ids")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InvalidRequest(f"the prompt has ids outside 0..{vocab_size - 1}", field="prompt_token_ids")
    if request.max_tokens < 1:
        raise InvalidRequest(f"max_tokens = {request.max_tokens}: expected 1 or more", field="max_tokens")
    limit = min(max_model_len, kv_cache_tokens)
    if len(prompt) + request.max_tokens > limit:
        field = "max_tokens" if len(prompt) < limit else "prompt_token_ids"
        what = "the model's length" if limit == max_model_len else "this replica's whole KV cache"
        raise InvalidRequest(
            f"{len(prompt)} prompt tokens and max_tokens = {request.max_tokens} exceed {what} of {limit} tokens",
            field=field,
        )
    _check_speculation(request)
    if request.num_logprobs is not None and not 0 <= request.num_logprobs <= vocab_size:
        raise InvalidRequest(f"num_logprobs = {request.num_logprobs}: expected 0 to {vocab_size}", field="num_logprobs")
    check_sampling(request.sampling)


def _check_speculation(request: GenerationRequest) -> None:
    is_standalone = request.mode.is_standalone
    length, longest = request.block_length or 0, (1 << 31) - 1 if is_standalone else MAX_BLOCK_LENGTH
    if not 0 <= length <= longest:
        raise InvalidRequest(f"block_length = {length}: expected 0 to {longest}", field="block_length")
    if is_standalone and request.policy not in (None, PolicyName.FIXED):
        raise InvalidRequest(f"policy = {request.policy}: only fixed, where drafts are not verified", field="policy")
    if is_standalone and request.num_logprobs is not None:
        raise InvalidRequest("logprobs are the primary's; there are none of unverified drafts", field="num_logprobs")
    if request.threshold is not None and not 0 <= request.threshold <= 1:
        raise InvalidRequest(f"threshold = {request.threshold}: expected 0 to 1", field="threshold")
    if request.threshold is not None and request.policy in (None, PolicyName.FIXED):
        raise InvalidRequest("threshold needs a policy other than fixed", field="threshold")


def check_open(command: OpenSequence) -> None:
    """Raises InvalidRequest where a drafter cannot open this sequence."""
    if not 0 < len(command.sequence_id.encode()) <= MAX_REQUEST_ID_BYTES:
        raise InvalidRequest(f"sequence_id must have 1 to {MAX_REQUEST_ID_BYTES} bytes", field="sequence_id")
    if command.incarnation < 0:
        raise InvalidRequest(f"incarnation = {command.incarnation}: expected 0 or more", field="incarnation")
    check_sampling(command.sampling)


def check_extend(command: ExtendSequence, info: DrafterInfo, num_received: int, num_drafted: int) -> None:
    """Raises InvalidRequest where a drafter cannot go on from there.

    It has num_received positions of the sequence, and num_drafted more that it has run itself.
    """
    num_tokens, num_unverified = len(command.token_ids), command.num_unverified or 0
    if not 0 <= num_unverified <= (0 if num_tokens else num_drafted):
        raise InvalidRequest(
            f"num_unverified = {num_unverified} behind {num_tokens} verified tokens: {num_drafted} have been drafted",
            field="num_unverified",
        )
    if command.start_position != num_received:
        raise InvalidRequest(
            f"start_position = {command.start_position}: expected {num_received}, positions have no gaps",
            field="start_position",
        )
    if num_tokens and not (min(command.token_ids) >= 0 and max(command.token_ids) < info.vocab_size):
        raise InvalidRequest(f"token_ids has ids outside 0..{info.vocab_size - 1}", field="token_ids")
    if command.next_token_id is not None and not 0 <= command.next_token_id < info.vocab_size:
        raise InvalidRequest(
            f"next_token_id = {command.next_token_id}: expected 0 to {info.vocab_size - 1}", field="next_token_id"
        )
    if not 0 <= command.block_length <= info.max_block_length:
        raise InvalidRequest(
            f"block_length = {command.block_length}: expected 0 to {info.max_block_length}", field="block_length"
        )
    if num_received + num_tokens + num_unverified + command.block_length > info.max_model_len:
        raise InvalidRequest(f"the sequence exceeds this drafter's {info.max_model_len} positions", field="token_ids")
    if command.stopping is not None:
        _check_stopping(command.stopping)
    _check_representations(command, info)


def _check_stopping(rule: StoppingRule) -> None:
    if rule.policy is PolicyName.FIXED:
        raise InvalidRequest("stopping.policy = 'fixed' ends no block", field="stopping.policy")
    for name in ("threshold", "keep_threshold", "step_cost"):
        value = getattr(rule, name)
        if value is not None and not 0 <= value <= 1:
            raise InvalidRequest(f"stopping.{name} = {value}: expected 0 to 1", field=f"stopping.{name}")


def _check_representations(command: ExtendSequence, info: DrafterInfo) -> None:
    """Shape and kind; whether the values are finite is looked at once for a whole batch."""
    found = command.representations
    if found is not None and not (isinstance(found, torch.Tensor) and found.is_floating_point()):
        raise InvalidRequest("representations must be floating-point numbers", field="representations")
    shape = (len(command.token_ids), len(info.taps), info.primary_hidden_size)
    if (None if found is None or found.numel() == 0 else tuple(found.shape)) != (shape if math.prod(shape) else None):
        raise InvalidRequest(
            f"representations have shape {None if found is None else tuple(found.shape)}: expected {shape}",
            field="representations",
        )
