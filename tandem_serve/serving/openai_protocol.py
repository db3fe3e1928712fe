"""OpenAI's request bodies, checked by hand-picked rules: what is not understood is refused by name, never ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tandem_serve.serving.openai_errors import ApiError
from tandem_serve.serving.validation import INT64_MAX, INT64_MIN
from tandem_serve.types import MAX_BLOCK_LENGTH, DecodingMode, PolicyName

# Parameters that clients send by default, with the values under which they change nothing. None always is one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}
# Parameters that OpenAI knows and that never change the text here, and those that can only be absent.
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
}
_INT32_MAX = (1 << 31) - 1  # what the wire carries
_STANDALONE = ("tandem", "tandem-representations")
_UNSUPPORTED = {"audio", "moderation", "prediction", "verbosity", "web_search_options"}

Body = TypeVar("Body", bound="GenerationBody")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # a client's default; nothing is obfuscated here


class SpeculationBody(_Strict):
    """Ours: how drafts are made. Changes the speed, never the text, but for the two tandem modes."""

    block_length: int | None = Field(None, ge=0, le=_INT32_MAX)  # drafts a round, at most; 0 is plain decoding
    mode: Literal["plain", "speculative", "tandem", "tandem-representations"] | None = None
    policy: Literal["fixed", "entropy", "router", "optimal"] | None = None
    threshold: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _false_if_none(value: Any) -> Any:
    return False if value is None else value


Flag = Annotated[bool, BeforeValidator(_false_if_none)]


class GenerationBody(_Strict):
    """What both endpoints take. Ranges that depend on the cluster are checked further in."""

    model: str = ""
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=INT64_MAX)  # -1 is vLLM's way to say all
    min_p: float | None = Field(None, ge=0, lt=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    stop: Annotated[list[str] | None, BeforeValidator(_one_or_many)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: Flag = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    block_length: int | None = Field(None, ge=0, le=MAX_BLOCK_LENGTH)  # the same as speculation.block_length
    speculation: SpeculationBody | None = None
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)  # ours: seconds until the last token
    return_token_ids: Flag = False  # vLLM's; here also how many of them were drafts

    def speculating(self) -> dict[str, Any]:
        """A TextRequest's fields that say how drafts are made. Raises ApiError where they contradict each other."""
        asked = self.speculation or SpeculationBody()
        if asked.block_length is not None and self.block_length is not None:
            raise _contradiction("block_length", "is given twice")
        if asked.threshold is not None and asked.policy in (None, "fixed"):
            raise _contradiction("threshold", "needs a policy other than fixed")
        if (asked.block_length or 0) > MAX_BLOCK_LENGTH and asked.mode not in _STANDALONE:
            raise _contradiction("block_length", f"is at most {MAX_BLOCK_LENGTH} where drafts are verified")
        if asked.policy not in (None, "fixed") and asked.mode in _STANDALONE:
            raise _contradiction("policy", "can only be fixed where drafts are not verified")
        return {
            "block_length": self.block_length if asked.block_length is None else asked.block_length,
            "policy": PolicyName(asked.policy) if asked.policy else None,
            "threshold": asked.threshold,
            "mode": DecodingMode(asked.mode or "speculative"),
        }

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _contradiction(name: str, what: str) -> ApiError:
    param = f"speculation.{name}"
    return ApiError(400, f"{param} {what}", param=param, code="invalid_value")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Any
    echo: Flag = False
    logprobs: int | None = Field(None, ge=0)


def _text_of(content: Any) -> Any:
    """The text of a message's content, which may come in parts."""
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {index} is not text; only {{'type': 'text', 'text': '...'}} is taken")
    return "".join(part["text"] for part in content)


class ChatMessage(_Strict):
    """One message. The fields that must be None are what clients send back of an answer of ours."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """A request body. Raises ApiError 400, naming the first parameter that is unknown, unsupported or wrong."""
    body = _without_neutral(_json_object(raw))
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown parameter: {param!r}", param=param, code="unknown_parameter") from None
        if first["type"] == "missing":
            raise ApiError(
                400, f"missing parameter: {param!r}", param=param, code="missing_required_parameter"
            ) from None
        raise ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value") from None


def prompts_of(prompt: Any, max_prompts: int) -> list[str | tuple[int, ...]]:
    """The prompts of a completion request: a string, a list of them, token ids, or a list of lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(
            400, "prompt must be a string, token ids, or a list of either", param="prompt", code="invalid_type"
        )
    if _is_token_ids(prompt):
        return [tuple(prompt)]
    if len(prompt) > max_prompts:
        message = f"prompt has {len(prompt)} items; at most {max_prompts} are taken at once"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    for index, item in enumerate(prompt):
        if not isinstance(item, str) and not (isinstance(item, list) and _is_token_ids(item)):
            message = f"prompt[{index}] is neither a string nor a list of token ids"
            raise ApiError(400, message, param=f"prompt[{index}]", code="invalid_type")
    return [item if isinstance(item, str) else tuple(item) for item in prompt]


def _is_token_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)  # a bool is no token id


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_neutral(body: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in body.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name in _NEUTRAL or name in _UNSUPPORTED:
            neutral = _NEUTRAL.get(name, ())
            if value is not None and value not in neutral:
                only = f"; only {' or '.join(map(json.dumps, neutral))} is taken" if neutral else ""
                message = f"the parameter {name!r} is not supported{only}"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
            continue
        kept[name] = value
    return kept


def _path(location: tuple[str | int, ...]) -> str:
    """A pydantic location as clients write it: messages[0].content."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
