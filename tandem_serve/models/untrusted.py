"""What is refused of a checkpoint before it is used: a folder may come from anybody. Needs no torch.

Weights and configuration are checked where they are read (weights.py, config.py). Here: which files a folder may hold,
and what a tokenizer may do to a prompt. The chat template runs in transformers' sandbox.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tandem_serve.errors import CheckpointError

_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_MAX_TEXT_FILE_BYTES = 64 << 20  # config.json, tokenizer.json and the like; the largest tokenizers have 35 MiB
_MAX_TOKENS = 1 << 22
_MAX_TOKEN_CHARS = 1 << 14
_MAX_GROWTH = 128
# How many characters one may become, at worst. What is not here (Precompiled: any table) is refused.
_NORMALIZER_GROWTH: Mapping[str, int] = {
    "BertNormalizer": 18,
    "ByteLevel": 4,
    "Lowercase": 3,
    "NFC": 4,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
    "Nmt": 1,
    "Prepend": 1,
    "Strip": 1,
    "StripAccents": 1,
}


def check_files(folder: Path) -> None:
    """Looks at a folder's entries, not into them; each is a file or a folder that lies inside it, and no pickle.

    A snapshot in the Hugging Face cache links to the blobs of its own repository.

    Raises:
        CheckpointError: naming the first entry that is something else.
    """
    here = folder.resolve()
    is_snapshot = here.parent.name == "snapshots" and here.parent.parent.name.startswith("models--")
    root = here.parent.parent if is_snapshot else here
    for entry in sorted(here.iterdir()):
        if entry.suffix in _PICKLES:
            raise CheckpointError(
                f"{folder}: {entry.name}: pickled weights can run code, and a checkpoint that holds any is refused; "
                "convert them to safetensors, or remove them"
            )
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            raise CheckpointError(f"{folder}: {entry.name} is a link out of the checkpoint's folder")
        try:
            found = entry.stat()
        except OSError as error:
            raise CheckpointError(f"{folder}: {entry.name}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise CheckpointError(f"{folder}: {entry.name} is neither a file nor a folder")
        if entry.suffix in (".json", ".jinja") and found.st_size > _MAX_TEXT_FILE_BYTES:
            raise CheckpointError(f"{folder}: {entry.name} has {found.st_size} bytes; at most {_MAX_TEXT_FILE_BYTES}")


def check_tokenizer(content: Mapping[str, Any]) -> None:
    """Looks for what would turn a short prompt, or one token, into gigabytes of text.

    Args:
        content: what tokenizer.json holds.

    Raises:
        CheckpointError: naming the part.
    """
    try:
        tokens = list(_tokens(content))
        for role in ("normalizer", "decoder"):
            if (growth := _growth(content.get(role), role)) > _MAX_GROWTH:
                raise CheckpointError(
                    f"the {role} makes a text up to {growth:.3g} times as long; at most {_MAX_GROWTH}"
                )
    except (AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise CheckpointError(f"damaged: {error!r}") from error
    if len(tokens) > _MAX_TOKENS:
        raise CheckpointError(f"{len(tokens)} tokens; at most {_MAX_TOKENS}")
    if (longest := max(map(len, tokens), default=0)) > _MAX_TOKEN_CHARS:
        raise CheckpointError(f"a token of {longest} characters; at most {_MAX_TOKEN_CHARS}")


def _tokens(content: Mapping[str, Any]) -> Iterator[str]:
    """Of every kind of model: a table of ids by token, or a list of tokens with their scores."""
    model = content["model"]
    vocabulary = model.get("vocab") or ()
    yield from vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
    yield from (token["content"] for token in content.get("added_tokens") or ())


def _growth(part: Mapping[str, Any] | None, role: str) -> float:
    """How many times longer a text may get in a normalizer or decoder: those of a sequence multiply."""
    if part is None:
        return 1.0
    kind = part["type"]
    if kind == "Sequence":
        growth = 1.0
        for inner in part[f"{role}s"]:
            growth *= _growth(inner, role)
        return growth
    if kind == "Replace":
        (pattern_kind, pattern), added = next(iter(part["pattern"].items())), len(part["content"])
        # A regular expression may match between any two characters.
        return max(1.0, added / len(pattern)) if pattern_kind == "String" and pattern else 1.0 + added
    if role == "decoder":  # these map tokens to their own text
        return 1.0
    if kind not in _NORMALIZER_GROWTH:
        raise CheckpointError(f"a normalizer of type {kind!r} is not supported")
    if len(part.get("prepend", "")) > _MAX_TOKEN_CHARS:
        raise CheckpointError("a normalizer that prepends a book")
    return float(_NORMALIZER_GROWTH[kind])
