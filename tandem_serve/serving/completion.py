"""Text in, text out, over any Primary: what the HTTP endpoints and the public gRPC service stand on.

A request becomes n token-level requests; their steps become text again one token at a time, so that what a client reads
does not depend on how many tokens a step brought: speculative and plain text are the same, character for character.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from tandem_serve.errors import InvalidRequest
from tandem_serve.serving.completion_text import CompletionText
from tandem_serve.serving.streams import merge
from tandem_serve.serving.validation import check_text, check_text_request, check_vocabulary
from tandem_serve.types import (
    GenerationRequest,
    ModelCard,
    PrimaryInfo,
    SamplingParams,
    TextDelta,
    TextRequest,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tandem_serve.config import RouterLimits, SpeculationConfig
    from tandem_serve.interfaces import Primary

_LONG_PROMPT_CHARS = 8_192  # tokenised in a thread: at some MB/s, more would hold up every other stream
_UINT64 = (1 << 64) - 1


class TextCompletion:
    """The TextService of one served model. Holds no state between requests but the primary's description."""

    def __init__(
        self,
        primary: Primary,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        eos_token_ids: Sequence[int],
        limits: Callable[[], RouterLimits],
        speculation: Callable[[], SpeculationConfig] | None = None,
    ) -> None:
        """limits, speculation: as they are at present; the second: what requests leave open, if it is to be said."""
        self._primary = primary
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._eos_token_ids = tuple(eos_token_ids)
        self._limits = limits
        self._speculation = speculation
        self._info: PrimaryInfo | None = None  # the same for every replica of the pool

    async def models(self) -> list[ModelCard]:
        """The one model. Raises Unavailable before any primary has been reached."""
        info = await self._primary_info()
        return [ModelCard(id=self._model_name, max_model_len=info.max_model_len)]

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See interfaces.TextService. Everything is checked before the first sequence starts."""
        if request.model not in ("", self._model_name):
            raise InvalidRequest(
                f"the model {request.model!r} does not exist; this is {self._model_name!r}", field="model"
            )
        check_text_request(request, self._limits())
        info = await self._primary_info()
        check_vocabulary(request.stop_token_ids, "stop_token_ids", info.vocab_size)
        prompt = await self._prompt_token_ids(request.prompt, info)
        streams = [
            self._completion(index, generation, request.stop)
            for index, generation in enumerate(self._generations(request, prompt, info.max_model_len))
        ]
        async with aclosing(merge(streams)) as deltas:
            async for _, delta in deltas:
                yield delta

    async def _primary_info(self) -> PrimaryInfo:
        if self._info is None:
            self._info = await self._primary.info()
        return self._info

    async def _prompt_token_ids(self, prompt: str | tuple[int, ...], info: PrimaryInfo) -> tuple[int, ...]:
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
            encode = self._tokenizer.encode
            encoding = await asyncio.to_thread(encode, prompt) if len(prompt) > _LONG_PROMPT_CHARS else encode(prompt)
            prompt = tuple(encoding.ids)
        check_vocabulary(prompt, "prompt", info.vocab_size)  # of a tokenizer too: it may know more than the model
        if not prompt:
            raise InvalidRequest("the prompt is empty; it needs at least one token", field="prompt")
        if len(prompt) >= info.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens; in the model's context of {info.max_model_len} tokens that "
                "leaves no room for an answer",
                field="prompt",
            )
        return prompt

    def _generations(
        self, request: TextRequest, prompt: tuple[int, ...], max_model_len: int
    ) -> list[GenerationRequest]:
        room = max_model_len - len(prompt)
        if request.max_tokens is not None and request.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {request.max_tokens}; the model's context of {max_model_len} tokens has room for "
                f"{room} after the prompt's {len(prompt)}",
                field="max_tokens",
            )
        request = self._with_policy(request)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        return [
            GenerationRequest(
                request_id=f"{request.request_id}-{index}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=request.top_k,
                    min_p=request.min_p,
                    seed=derive_seed(seed, index),
                ),
                max_tokens=room if request.max_tokens is None else request.max_tokens,
                stop_token_ids=(*(() if request.ignore_eos else self._eos_token_ids), *request.stop_token_ids),
                num_logprobs=request.logprobs,
                block_length=request.block_length,
                timeout_s=request.timeout_s,
                traceparent=request.traceparent,
                policy=request.policy,
                threshold=request.threshold,
                mode=request.mode,
            )
            for index in range(request.n)
        ]

    def _with_policy(self, request: TextRequest) -> TextRequest:
        """A request that names no policy gets the router's."""
        if self._speculation is None or request.policy is not None or request.mode.is_standalone:
            return request
        ours = self._speculation()
        return replace(request, policy=ours.policy, threshold=ours.threshold)

    async def _completion(
        self, index: int, generation: GenerationRequest, stop: tuple[str, ...]
    ) -> AsyncGenerator[TextDelta, None]:
        text = CompletionText(index, generation.prompt_token_ids, self._tokenizer, stop)
        async with aclosing(self._primary.generate(generation)) as steps:
            async for step in steps:
                delta = text.add(step)
                yield delta
                if delta.finish_reason is not None:  # perhaps by a stop string, of which the engine knows nothing
                    return


def derive_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request: its own for the first, well mixed for the others (SplitMix64)."""
    if index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _UINT64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _UINT64
    mixed ^= mixed >> 31
    return mixed - (1 << 64) if mixed >> 63 else mixed
