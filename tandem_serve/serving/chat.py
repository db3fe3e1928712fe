"""Chat messages to a prompt, by the tokenizer's own template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem_serve.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ChatTemplate:
    """The Jinja template that a tokenizer ships with, rendered in transformers' sandbox."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        from transformers import PreTrainedTokenizerFast  # a second to import: only where there is a template

        self._renderer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        self._tokenizer = tokenizer

    def token_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt that asks for the assistant's next message. The template writes all special tokens itself.

        Raises:
            InvalidRequest: with the template's own complaint.
        """
        try:
            text = self._renderer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        return tuple(self._tokenizer.encode(str(text), add_special_tokens=False).ids)


def load_chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of a checkpoint folder; None where its tokenizer has none (a base model).

    Raises:
        CheckpointError: for a damaged tokenizer_config.json.
    """
    config = folder / "tokenizer_config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config}: cannot be read: {error}") from error
    if "chat_template" not in settings and not (folder / "chat_template.jinja").is_file():
        return None
    return ChatTemplate(folder, tokenizer)
