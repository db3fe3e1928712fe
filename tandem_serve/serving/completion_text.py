"""One sequence's steps as text: detokenised, cut at stop strings, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem_serve.decoding.stopping import StopStrings
from tandem_serve.serving.detokenizer import IncrementalDetokenizer
from tandem_serve.types import FinishReason, GenerationStep, TextDelta, TextUsage

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class CompletionText:
    """Turns GenerationSteps into TextDeltas. Tokens after the one that completes a stop string do not count."""

    def __init__(self, index: int, prompt_token_ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._index = index
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids)
        self._stop = StopStrings(stop)
        self._num_prompt_tokens = len(prompt_token_ids)
        self._num_tokens = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    def add(self, step: GenerationStep) -> TextDelta:
        """The delta that a step amounts to; with finish_reason set, the last one."""
        text, num_accepted_chars, num_tokens = "", 0, 0
        for token_id in step.token_ids:
            text += self._stop.feed(self._detokenizer.push(token_id))
            num_tokens += 1
            if num_tokens == step.num_accepted_tokens:
                num_accepted_chars = len(text)
            if self._stop.matched is not None:
                break
        finish_reason = step.finish_reason
        if self._stop.matched is not None:
            finish_reason = FinishReason.STOP
        elif finish_reason is not None:
            text += self._stop.flush()
        num_accepted_tokens = min(step.num_accepted_tokens, num_tokens)
        if num_tokens <= num_accepted_tokens:
            num_accepted_chars = len(text)
        self._count(num_tokens, step.num_draft_tokens, num_accepted_tokens)
        return TextDelta(
            index=self._index,
            text=text,
            token_ids=step.token_ids[:num_tokens],
            num_accepted_tokens=num_accepted_tokens,
            num_draft_tokens=step.num_draft_tokens,
            num_accepted_chars=num_accepted_chars,
            logprobs=step.logprobs[:num_tokens],
            finish_reason=finish_reason,
            usage=self._usage() if finish_reason is not None else None,
        )

    def _count(self, num_tokens: int, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._num_drafts += num_draft_tokens > 0
        self._num_draft_tokens += num_draft_tokens
        self._num_accepted_tokens += num_accepted_tokens

    def _usage(self) -> TextUsage:
        return TextUsage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )
