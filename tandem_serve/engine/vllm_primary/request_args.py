"""A GenerationRequest on its way through vLLM: what SamplingParams has no field for rides in its extra_args."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tandem_serve.engine.validation import MAX_REQUEST_ID_BYTES
from tandem_serve.types import DecodingMode, GenerationRequest, PolicyName, SamplingParams

KEY = "tandem"
_GREEDY = SamplingParams(temperature=0.0)


def extra_args(request: GenerationRequest, *, shared_noise: bool) -> dict[str, Any]:
    """The tandem part of a request. With shared noise vLLM is asked for greedy choice; the sampler adds the noise."""
    return {
        KEY: {
            "request_id": request.request_id,
            "sampling": asdict(request.sampling) if shared_noise else None,
            "block_length": request.block_length,
            "drafter_address": request.drafter_address,
            "traceparent": request.traceparent,
            "policy": request.policy,
            "threshold": request.threshold,
            "mode": request.mode,
        }
    }


def noise_sampling(extra: Mapping[str, Any] | None) -> SamplingParams | None:
    """How the sampler is to choose for a request with these extra_args; None: vLLM's own way."""
    sampling = _ours(extra).get("sampling")
    return None if sampling is None or sampling["temperature"] == 0 else SamplingParams(**sampling)


def drafting_request(
    vllm_request_id: str, prompt_token_ids: Sequence[int], max_tokens: int, extra: Mapping[str, Any] | None
) -> GenerationRequest:
    """The request as a drafter sees it. One that comes from another front end than ours is drafted for greedily.

    So is a sampled one under vLLM's own rejection sampler: with ids alone on the wire the likeliest draft is the one
    most often accepted.
    """
    found = _ours(extra)
    return GenerationRequest(
        request_id=found.get("request_id") or vllm_request_id[-MAX_REQUEST_ID_BYTES:],
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=noise_sampling(extra) or _GREEDY,
        max_tokens=max_tokens,
        block_length=found.get("block_length"),
        drafter_address=found.get("drafter_address"),
        traceparent=found.get("traceparent"),
        policy=None if found.get("policy") is None else PolicyName(found["policy"]),
        threshold=found.get("threshold"),
        mode=DecodingMode(found.get("mode", DecodingMode.SPECULATIVE)),
    )


def _ours(extra: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What `extra_args` has put there. vLLM's own server lets clients put anything else under any name."""
    found = (extra or {}).get(KEY)
    return found if isinstance(found, dict) else {}
