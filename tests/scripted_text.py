"""A TextService without models, for tests of what stands in front of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from tandem_serve.types import FinishReason, ModelCard, TextDelta, TextRequest, TextUsage, TokenLogprob

CARDS = [ModelCard("demo", 512)]


class ScriptedText:
    """Says "a b c" to each of the n completions, a letter a delta. With `gate`, waits for it after the first."""

    def __init__(self, *, error: Exception | None = None, gate: asyncio.Event | None = None) -> None:
        self.requests: list[TextRequest] = []
        self.num_running = 0
        self.idle = asyncio.Event()  # set whenever a request ends
        self._error, self._gate = error, gate

    async def models(self) -> list[ModelCard]:
        if self._error is not None:
            raise self._error
        return CARDS

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        self.requests.append(request)
        self.num_running += 1
        try:
            for number in range(_length(request)):
                for index in range(request.n):
                    yield self._delta(request, index, number)
                if self._error is not None:
                    raise self._error
                if self._gate is not None:
                    await self._gate.wait()
        finally:
            self.num_running -= 1
            self.idle.set()

    def _delta(self, request: TextRequest, index: int, number: int) -> TextDelta:
        last = number + 1 == _length(request)
        return TextDelta(
            index,
            chr(ord("a") + number % 26) + " ",
            token_ids=(number,),
            num_accepted_tokens=1,
            num_draft_tokens=2,
            num_accepted_chars=2,
            logprobs=(TokenLogprob(number, -0.1),) if request.logprobs is not None else (),
            finish_reason=FinishReason.LENGTH if last else None,
            usage=TextUsage(3, number + 1, number + 1, 2 * number + 2, number + 1) if last else None,
        )


def _length(request: TextRequest) -> int:
    return min(request.max_tokens or 3, 3)
