"""What a text request may ask for. Every message names the field and the values that it takes."""

from __future__ import annotations

from collections.abc import Sequence

from tandem_serve.config import RouterLimits
from tandem_serve.errors import InvalidRequest
from tandem_serve.types import MAX_BLOCK_LENGTH, TextRequest

MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64

MAX_TOP_K = (1 << 31) - 1  # what the wire carries
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def check_text_request(request: TextRequest, limits: RouterLimits) -> None:
    """Raises InvalidRequest for the first field out of range. Knows no model: lengths and vocabulary come later."""
    _check_range("max_tokens", request.max_tokens, 1, INT64_MAX)
    _check_range("temperature", request.temperature, 0, 2)
    if not 0 < request.top_p <= 1:
        raise _out_of_range("top_p", request.top_p, "above 0 and at most 1")
    _check_range("top_k", request.top_k, 0, MAX_TOP_K)
    if not 0 <= request.min_p < 1:
        raise _out_of_range("min_p", request.min_p, "at least 0 and below 1")
    _check_range("seed", request.seed, INT64_MIN, INT64_MAX)
    _check_range("n", request.n, 1, limits.max_n)
    _check_range("logprobs", request.logprobs, 0, limits.max_logprobs)
    if not request.mode.is_standalone:
        _check_range("block_length", request.block_length, 0, MAX_BLOCK_LENGTH)
    elif request.logprobs is not None:
        raise _out_of_range("logprobs", request.logprobs, "none where drafts are not verified: they are the primary's")
    _check_range("threshold", request.threshold, 0, 1)
    _check_stop(request.stop, limits)
    if len(request.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        count = len(request.stop_token_ids)
        raise _out_of_range("stop_token_ids", f"{count} ids", f"at most {MAX_STOP_TOKEN_IDS} ids")


def check_vocabulary(token_ids: Sequence[int], field: str, vocab_size: int) -> None:
    """Raises InvalidRequest unless every id is one of the model's."""
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{field}[{index}] is {token_id}; the model's token ids go from 0 to {vocab_size - 1}",
                field=f"{field}[{index}]",
            )


def check_text(text: str, field: str) -> None:
    """Raises InvalidRequest for text that is not Unicode (JSON's escapes can spell half a surrogate pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field} is not valid Unicode text: {error.reason}", field=field) from None


def _check_stop(stop: Sequence[str], limits: RouterLimits) -> None:
    if len(stop) > limits.max_stop_strings:
        raise _out_of_range("stop", f"{len(stop)} strings", f"at most {limits.max_stop_strings} strings")
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise _out_of_range(f"stop[{index}]", f"{len(text)} characters", f"1 to {MAX_STOP_CHARS} characters")
        check_text(text, f"stop[{index}]")


def _check_range(field: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:  # false for NaN too
        raise _out_of_range(field, value, f"{low} to {high}" if high < INT64_MAX else f"at least {low}")


def _out_of_range(field: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {value}; allowed: {allowed}", field=field)
