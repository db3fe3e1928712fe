"""Token ids to text, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_CONTEXT_TOKENS = 6  # of the prompt: enough for a decoder that joins or strips at word boundaries
_REPLACEMENT = "\ufffd"  # what a decoder makes of an incomplete UTF-8 sequence
_MAX_HELD_TOKENS = 16  # no character takes so many: these bytes are simply not UTF-8


class IncrementalDetokenizer:
    """The text that each new token adds. Special tokens have none.

    A token may end within a character, and what a token looks like may depend on its neighbours; so text is the
    difference between decoding a short window with and without the new tokens, and is held back while it ends in an
    incomplete character. A character still incomplete when the sequence ends is never shown; bytes that are no
    character at all come out as U+FFFD.
    (The two-offset algorithm of text-generation-inference and vLLM.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._num_shown = len(self._window)  # tokens of the window whose text is out
        self._shown = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now complete, often one word, sometimes nothing."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._shown:  # a special token
            self._window.pop()
            return ""
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_shown < _MAX_HELD_TOKENS:
            return ""
        new = text[len(self._shown) :]
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """One token by itself, special ones included, as listed among log-probabilities."""
    return tokenizer.decode([token_id], skip_special_tokens=False)
