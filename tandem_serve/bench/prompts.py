"""What benchmarks complete: prompts from a JSONL file, or the documents that a pair was not trained on."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from tandem_serve.training.held_out import HELD_OUT, evaluation_documents, heldout_prompts, read_jsonl

_HELD_OUT_PROMPT_TOKENS = 128


def load_prompts(
    source: str, field: str, limit: int, tokenizer: Tokenizer, primary: Path, max_prompt_tokens: int
) -> list[tuple[int, ...]]:
    """Prompts as token ids, at most `limit`. Too long a prompt of a JSONL file keeps its end.

    Args:
        source: a JSONL file of prompts; or text to cut them from: `heldout`, for the documents that the primary's
            provenance lists as held out, a text file or a folder.
        field: which key of a JSONL line is the prompt.

    Raises:
        ConfigError: naming the file, line or field that cannot be used.
    """
    if not source.endswith(".jsonl"):
        num_tokens = min(_HELD_OUT_PROMPT_TOKENS, max_prompt_tokens)
        return held_out_prompts(tokenizer, primary, limit, num_tokens, source)
    texts = read_jsonl(Path(source), field, limit)
    return [tuple(tokenizer.encode(text).ids[-max_prompt_tokens:]) for text in texts]


def held_out_prompts(
    tokenizer: Tokenizer, primary: Path, limit: int, num_tokens: int, source: str = HELD_OUT
) -> list[tuple[int, ...]]:
    """Stretches of `num_tokens` of what the primary was not trained on: at 128 the very prompts of `eval`."""
    documents = evaluation_documents(source, "", primary)
    prompts = heldout_prompts(documents, tokenizer, limit, min_tokens=num_tokens, max_tokens=num_tokens)
    return [prompt.token_ids for prompt in prompts]
