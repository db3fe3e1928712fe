"""A Primary that says what it is told, for tests of what stands in front of one: pairing, text, HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence

from tandem_serve.types import (
    FinishReason,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    PrimaryStatus,
    TokenLogprob,
)

INFO = PrimaryInfo(
    model="scripted",
    fingerprint="f",
    tokenizer_hash="t",
    vocab_size=288,
    hidden_size=8,
    num_layers=2,
    max_model_len=512,
)


class ScriptedPrimary:
    """Says `token_ids` in steps of `step_sizes`; all but the last token of a step count as accepted drafts.

    Ends at max_tokens, at stop ids, and with STOP when nothing is left to say. What the prompt has beyond
    `prompt_length` it takes as said already, so that it can take over from another one. Raises `error` once
    `error_after` tokens are out; with `gate`, waits for it before every step but the first.
    """

    def __init__(
        self,
        token_ids: Sequence[int] = (),
        *,
        step_sizes: Sequence[int] = (3,),
        prompt_length: int | None = None,
        error: Exception | None = None,
        error_after: int = 0,
        gate: asyncio.Event | None = None,
    ) -> None:
        self.token_ids = tuple(token_ids)
        self.requests: list[GenerationRequest] = []
        self.num_running = 0
        self.num_closed_early = 0
        self._step_sizes = step_sizes
        self._prompt_length = prompt_length
        self._error, self._error_after, self._gate = error, error_after, gate

    async def info(self) -> PrimaryInfo:
        return INFO

    async def status(self) -> PrimaryStatus:
        return PrimaryStatus(self.num_running, 0, 0.0, (("drafter:1", "ready"),))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        self.requests.append(request)
        self.num_running += 1
        finish_reason = None
        try:
            said = 0 if self._prompt_length is None else len(request.prompt_token_ids) - self._prompt_length
            num_out = 0
            for size in itertools.cycle(self._step_sizes):
                if self._error is not None and num_out >= self._error_after:
                    raise self._error
                if self._gate is not None and num_out:
                    await self._gate.wait()
                start = said + num_out
                step = self._step(request, self.token_ids[start : start + min(size, request.max_tokens - num_out)])
                num_out += len(step.token_ids)
                finish_reason = step.finish_reason or self._end(request, num_out, said)
                if finish_reason is None:
                    yield step
                else:
                    yield GenerationStep(
                        step.request_id,
                        step.token_ids,
                        step.num_accepted_tokens,
                        step.num_draft_tokens,
                        step.logprobs,
                        finish_reason,
                    )
                    return
        finally:
            self.num_running -= 1
            self.num_closed_early += finish_reason is None

    def _step(self, request: GenerationRequest, token_ids: tuple[int, ...]) -> GenerationStep:
        stops = [i for i, token_id in enumerate(token_ids) if token_id in request.stop_token_ids]
        token_ids = token_ids[: stops[0] + 1] if stops else token_ids
        logprobs = ()
        if request.num_logprobs is not None:
            logprobs = tuple(
                TokenLogprob(token_id, -0.5, tuple((token_id + i, -0.5 - i) for i in range(request.num_logprobs)))
                for token_id in token_ids
            )
        num_accepted = max(len(token_ids) - 1, 0)
        num_drafts = 0 if request.block_length == 0 else num_accepted + 1
        reason = FinishReason.STOP if stops else None
        return GenerationStep(request.request_id, token_ids, num_accepted, num_drafts, logprobs, reason)

    def _end(self, request: GenerationRequest, num_out: int, said: int) -> FinishReason | None:
        if num_out >= request.max_tokens:
            return FinishReason.LENGTH
        return FinishReason.STOP if said + num_out >= len(self.token_ids) else None
