"""What benchmarks complete: prompts from a JSONL file, or the documents that a pair was not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tandem_serve.errors import ConfigError
from tandem_serve.training.corpus import read_documents
from tandem_serve.training.held_out import heldout_prompts

HELD_OUT = "heldout"
_HELD_OUT_PROMPT_TOKENS = 128


def load_prompts(
    source: str, field: str, limit: int, tokenizer: Tokenizer, primary: Path, max_prompt_tokens: int
) -> list[tuple[int, ...]]:
    """Prompts as token ids, at most `limit`. Too long a prompt keeps its end.

    Args:
        source: a JSONL file, or `heldout` for the documents that the primary's provenance lists as held out.
        field: which key of a JSONL line is the prompt.

    Raises:
        ConfigError: naming the file, line or field that cannot be used.
    """
    if source == HELD_OUT:
        return held_out_prompts(tokenizer, primary, limit, min(_HELD_OUT_PROMPT_TOKENS, max_prompt_tokens))
    texts = _read_jsonl(Path(source), field, limit)
    return [tuple(tokenizer.encode(text).ids[-max_prompt_tokens:]) for text in texts]


def held_out_prompts(tokenizer: Tokenizer, primary: Path, limit: int, num_tokens: int) -> list[tuple[int, ...]]:
    """Stretches of `num_tokens` of the held-out documents: at 128 the very prompts of `train evaluate`."""
    provenance = _provenance(primary)
    wanted = set(provenance.get("held_out") or ())
    documents = [d for d in read_documents(str(provenance.get("data", ""))) if d.name in wanted]
    if not documents:
        raise ConfigError(f"{primary}: its provenance names no held-out documents; give --prompts FILE.jsonl")
    prompts = heldout_prompts(documents, tokenizer, limit, min_tokens=num_tokens, max_tokens=num_tokens)
    return [prompt.token_ids for prompt in prompts]


def _provenance(primary: Path) -> dict[str, Any]:
    file = primary / "provenance.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give --prompts FILE.jsonl instead of heldout") from error
    return found if isinstance(found, dict) else {}


def _read_jsonl(file: Path, field: str, limit: int) -> list[str]:
    texts: list[str] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(texts) == limit:
                    break
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise ConfigError(f"{file}:{number}: no text in field {field!r}; choose another with --field")
                texts.append(row[field])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON lines: {error}") from error
    if not texts:
        raise ConfigError(f"{file}: no prompts in it")
    return texts
