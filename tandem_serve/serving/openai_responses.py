"""Text deltas as OpenAI's response objects, whole or in chunks. Built from the `openai` package's own types.

Beyond them a response may carry vLLM's fields: `metrics.speculative_decoding` beside `usage`, and with
`return_token_ids` each choice's `token_ids`, here with `num_accepted_tokens` and `num_accepted_chars`, which tell
drafted text from the primary's own, and `num_draft_tokens`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from tandem_serve.serving.detokenizer import token_text
from tandem_serve.types import TextDelta, TokenLogprob

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(slots=True)
class Tally:
    """What the deltas of a whole request add up to: OpenAI's usage, and vLLM's speculative metrics."""

    prompt_tokens: dict[int, int] = field(default_factory=dict)  # by prompt: its n completions share it
    completion_tokens: int = 0
    num_sequences: int = 0
    num_draft_tokens: int = 0
    max_draft_tokens: int = 0
    steps_by_accepted: list[int] = field(default_factory=list)  # [i]: steps that accepted i drafts

    def add(self, prompt_index: int, delta: TextDelta) -> None:
        if delta.num_draft_tokens:
            self.num_draft_tokens += delta.num_draft_tokens
            self.max_draft_tokens = max(self.max_draft_tokens, delta.num_draft_tokens)
            missing = delta.num_accepted_tokens + 1 - len(self.steps_by_accepted)
            self.steps_by_accepted.extend([0] * missing)
            self.steps_by_accepted[delta.num_accepted_tokens] += 1
        if delta.usage is not None:
            self.prompt_tokens[prompt_index] = delta.usage.prompt_tokens
            self.completion_tokens += delta.usage.completion_tokens
            self.num_sequences += 1

    def usage(self) -> CompletionUsage:
        prompt_tokens = sum(self.prompt_tokens.values())
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=prompt_tokens + self.completion_tokens,
        )

    def speculative_metrics(self) -> dict[str, Any]:
        """The field `metrics` as vLLM reports it: for a single sequence, and where there were drafts; else no field."""
        num_steps = sum(self.steps_by_accepted)
        if self.num_sequences != 1 or not num_steps:
            return {}
        accepted = sum(i * steps for i, steps in enumerate(self.steps_by_accepted))
        return {
            "metrics": {
                "speculative_decoding": {
                    "mean_acceptance_length": 1 + accepted / num_steps,
                    "draft_acceptance_rate": accepted / self.num_draft_tokens,
                    "acceptance_histogram": self.steps_by_accepted,
                    "num_spec_steps": num_steps,
                    "num_accepted_draft_tokens": accepted,
                    "num_draft_tokens": self.num_draft_tokens,
                    "num_spec_tokens": self.max_draft_tokens,
                }
            }
        }


class Responses(ABC):
    """The answer to one HTTP request, in one of the two endpoints' shapes."""

    def __init__(self, response_id: str, model: str, tokenizer: Tokenizer, *, return_token_ids: bool) -> None:
        self._head: dict[str, Any] = {"id": response_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._return_token_ids = return_token_ids

    def whole(self, deltas_by_choice: Sequence[Sequence[TextDelta]], tally: Tally) -> BaseModel:
        """The response of a request that does not stream."""
        choices = [self._choice(index, deltas) for index, deltas in enumerate(deltas_by_choice)]
        return self._whole(choices=choices, usage=tally.usage(), **self._head, **tally.speculative_metrics())

    def last_chunk(self, tally: Tally) -> BaseModel:
        """The chunk with the usage, after all choices have finished."""
        return self._chunk(choices=[], usage=tally.usage(), **self._head, **tally.speculative_metrics())

    def first_chunks(self, num_choices: int) -> list[BaseModel]:
        """What a stream begins with."""
        return []

    @abstractmethod
    def chunks(self, index: int, delta: TextDelta) -> list[BaseModel]:
        """What a stream shows of one delta; nothing where there is nothing to show."""

    @abstractmethod
    def _choice(self, index: int, deltas: Sequence[TextDelta]) -> BaseModel: ...

    @abstractmethod
    def _whole(self, **fields: Any) -> BaseModel: ...

    @abstractmethod
    def _chunk(self, **fields: Any) -> BaseModel: ...

    def _is_empty(self, delta: TextDelta) -> bool:
        tokens_matter = self._return_token_ids or delta.logprobs
        return not (delta.text or delta.finish_reason or (tokens_matter and delta.token_ids))

    def _origins(self, deltas: Sequence[TextDelta]) -> dict[str, Any]:
        if not self._return_token_ids:
            return {}
        fields: dict[str, Any] = {"token_ids": [token_id for delta in deltas for token_id in delta.token_ids]}
        fields["num_accepted_tokens"] = sum(delta.num_accepted_tokens for delta in deltas)
        fields["num_draft_tokens"] = sum(delta.num_draft_tokens for delta in deltas)
        fields["num_accepted_chars"] = sum(delta.num_accepted_chars for delta in deltas)
        return fields

    def _token_text(self, token_id: int) -> str:
        return token_text(self._tokenizer, token_id)


class CompletionResponses(Responses):
    """/v1/completions. With `echo` each choice starts with its prompt."""

    def __init__(self, *args: Any, echoes: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head["object"] = "text_completion"
        self._echoes = echoes  # by choice; none without echo
        self._num_chars: dict[int, int] = defaultdict(int)  # by choice: where the next listed token starts

    def first_chunks(self, num_choices: int) -> list[BaseModel]:
        return [self._text_chunk(index, text=text, finish_reason=None) for index, text in enumerate(self._echoes)]

    def chunks(self, index: int, delta: TextDelta) -> list[BaseModel]:
        if self._is_empty(delta):
            return []
        logprobs = {"logprobs": self._logprobs(index, delta.logprobs)} if delta.logprobs else {}
        return [
            self._text_chunk(
                index, text=delta.text, finish_reason=delta.finish_reason, **logprobs, **self._origins([delta])
            )
        ]

    def _text_chunk(self, index: int, **fields: Any) -> BaseModel:
        fields.setdefault("logprobs", None)
        # finish_reason is None in a chunk, which the type, made for whole responses, would refuse
        choice = CompletionChoice.model_construct(index=index, **fields)
        return self._chunk(choices=[choice], **self._head)

    def _choice(self, index: int, deltas: Sequence[TextDelta]) -> BaseModel:
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
        return CompletionChoice.model_validate(
            {
                "index": index,
                "text": (self._echoes[index] if self._echoes else "") + "".join(delta.text for delta in deltas),
                "finish_reason": deltas[-1].finish_reason,
                "logprobs": self._logprobs(index, logprobs) if logprobs else None,
                **self._origins(deltas),
            }
        )

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Logprobs:
        tokens = [self._token_text(logprob.token_id) for logprob in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._num_chars[index])
            self._num_chars[index] += len(token)
        return Logprobs(
            tokens=tokens,
            token_logprobs=[_finite(logprob.logprob) for logprob in logprobs],
            top_logprobs=[self._top(logprob) for logprob in logprobs],
            text_offset=offsets,
        )

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """By text, the chosen token among them; of tokens that share a text (parts of characters) the likeliest."""
        by_text: dict[str, float] = {}
        for token_id, value in (*logprob.top, (logprob.token_id, logprob.logprob)):
            by_text.setdefault(self._token_text(token_id), _finite(value))
        return by_text

    def _whole(self, **fields: Any) -> BaseModel:
        return Completion.model_construct(**fields)

    def _chunk(self, **fields: Any) -> BaseModel:
        return Completion.model_construct(**fields)


class ChatResponses(Responses):
    """/v1/chat/completions."""

    def first_chunks(self, num_choices: int) -> list[BaseModel]:
        return [self._delta_chunk(index, {"role": "assistant", "content": ""}) for index in range(num_choices)]

    def chunks(self, index: int, delta: TextDelta) -> list[BaseModel]:
        if self._is_empty(delta):
            return []
        content = {"content": delta.text} if delta.text or delta.token_ids else {}
        logprobs = {"logprobs": self._logprobs([delta])} if delta.logprobs else {}
        return [
            self._delta_chunk(index, content, finish_reason=delta.finish_reason, **logprobs, **self._origins([delta]))
        ]

    def _delta_chunk(self, index: int, content: dict[str, str], **fields: Any) -> BaseModel:
        choice = {"index": index, "delta": content, "finish_reason": None, "logprobs": None, **fields}
        return self._chunk(choices=[chat_completion_chunk.Choice.model_validate(choice)], **self._head)

    def _choice(self, index: int, deltas: Sequence[TextDelta]) -> BaseModel:
        message = ChatCompletionMessage(role="assistant", content="".join(delta.text for delta in deltas))
        return chat_completion.Choice.model_validate(
            {
                "index": index,
                "message": message,
                "finish_reason": deltas[-1].finish_reason,
                "logprobs": self._logprobs(deltas),
                **self._origins(deltas),
            }
        )

    def _logprobs(self, deltas: Sequence[TextDelta]) -> dict[str, Any] | None:
        listed = [logprob for delta in deltas for logprob in delta.logprobs]
        if not listed:
            return None
        content = [
            ChatCompletionTokenLogprob(
                **self._token(logprob.token_id, logprob.logprob),
                top_logprobs=[TopLogprob(**self._token(token_id, value)) for token_id, value in logprob.top],
            )
            for logprob in listed
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8"))}

    def _whole(self, **fields: Any) -> BaseModel:
        return ChatCompletion.model_construct(object="chat.completion", **fields)

    def _chunk(self, **fields: Any) -> BaseModel:
        return ChatCompletionChunk.model_construct(object="chat.completion.chunk", **fields)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
