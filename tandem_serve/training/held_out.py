"""Text that a pair was not trained on, and prompts cut from it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tandem_serve.errors import ConfigError
from tandem_serve.training.corpus import (
    STDLIB_HELD_OUT,
    Document,
    cut_ends,
    read_documents,
    split_held_out,
    stdlib_folder,
)

HELD_OUT = "heldout"


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """The beginning of a text to continue, and the module and token offset that it was cut at."""

    name: str
    text: str
    token_ids: tuple[int, ...]


def write_held_out(file: Path) -> None:
    """Lists the held-out modules (models/demo/heldout.json)."""
    record = {"source": "stdlib", "python": platform.python_version(), "modules": list(STDLIB_HELD_OUT)}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_held_out(file: Path) -> list[Document]:
    """The modules listed in heldout.json, from the running interpreter's library; those it lacks are left out.

    Raises:
        ConfigError: where the file cannot be used or none of the modules exists.
    """
    try:
        names = json.loads(file.read_text("utf-8"))["modules"]
        found = [(name, stdlib_folder() / name) for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a list of held-out modules: {error!r}") from error
    documents = [Document(name, path.read_text("utf-8", errors="replace")) for name, path in found if path.is_file()]
    if not documents:
        raise ConfigError(f"{file}: this interpreter's library has none of the modules")
    return documents


def evaluation_documents(source: str, field: str, primary: Path) -> list[Document]:
    """The documents of a source that a primary was not trained on.

    Args:
        source: `heldout`, the source that the primary's provenance names; or any that read_documents takes; or a JSONL
            file. Of the source that the primary was trained on, its held-out part; of any other, everything.
        field: which key of a JSONL line is its text.

    Raises:
        ConfigError: naming what cannot be used.
    """
    provenance = _provenance(primary) if source == HELD_OUT or (primary / "provenance.json").is_file() else {}
    trained_on = str(provenance.get("data", ""))
    if source == HELD_OUT and not provenance.get("held_out"):
        raise ConfigError(f"{primary}: its provenance names no held-out documents; name a source of text instead")
    if source in (HELD_OUT, trained_on):
        documents = read_documents(trained_on)
        if provenance.get("cut", len(documents) == 1):  # what training did, whatever there is now
            return cut_ends(documents)[1]
        return split_held_out(documents, provenance.get("held_out"))[1]
    if source.endswith(".jsonl"):
        return [Document(f"{Path(source).name}:{n}", text) for n, text in enumerate(read_jsonl(Path(source), field), 1)]
    return read_documents(source)


def read_jsonl(file: Path, field: str, limit: int | None = None) -> list[str]:
    """One field of the first `limit` lines of a JSONL file.

    Raises:
        ConfigError: naming the file, line or field that cannot be used.
    """
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
        raise ConfigError(f"{file}: no text in it")
    return texts


def _provenance(primary: Path) -> dict[str, Any]:
    file = primary / "provenance.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); name a file of text instead of heldout") from error
    return found if isinstance(found, dict) else {}


def heldout_prompts(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    limit: int,
    *,
    min_tokens: int = 64,
    max_tokens: int = 256,
    seed: int = 0,
) -> list[HeldOutPrompt]:
    """Cuts `limit` prompts, each from the start of some line on, going round the modules in turn.

    Deterministic in (documents, limit, seed), and the first n prompts are the same whatever the limit. Modules too
    short for max_tokens are passed over.
    """
    random = np.random.default_rng(seed)
    usable = [(d, ids) for d in documents if len(ids := tokenizer.encode(d.text).ids) > 2 * max_tokens]
    if not usable:
        raise ConfigError(f"no document to cut prompts from has more than {2 * max_tokens} tokens: give longer texts")
    prompts = []
    for i in range(limit):
        document, token_ids = usable[i % len(usable)]
        wanted = int(random.integers(min_tokens, max_tokens + 1))
        start = _line_start(token_ids, int(random.integers(len(token_ids) - 2 * max_tokens)), tokenizer, max_tokens)
        chosen = token_ids[start : start + wanted]
        text = tokenizer.decode(chosen, skip_special_tokens=False)
        prompts.append(HeldOutPrompt(f"{document.name}:{start}", text, tuple(chosen)))
    return prompts


def _line_start(token_ids: Sequence[int], start: int, tokenizer: Tokenizer, reach: int) -> int:
    """The first place at or behind `start` that follows a line break; `start` itself where none is within reach."""
    for place in range(start, start + reach):
        if place == 0 or "\n" in tokenizer.decode([token_ids[place - 1]]):
            return place
    return start
