"""A checkpoint's folder and what lies in it besides weights: configuration files, the tokenizer. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tandem_serve.errors import CheckpointError
from tandem_serve.models.untrusted import check_files, check_tokenizer

_MAX_ADDED_TOKENS = 64


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """A checkpoint's local folder; a hub id is downloaded (or found in the cache) first.

    Raises:
        CheckpointError: where there is neither such a folder nor such a repository, or files in it are not to be had.
    """
    folder = Path(path_or_hub_id).expanduser()
    if not folder.is_dir():
        folder = _download(path_or_hub_id)
    check_files(folder)
    return folder


def _download(path_or_hub_id: str | Path) -> Path:
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name[0] in "./":
        raise CheckpointError(f"{name}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        )
    except Exception as error:  # network, authentication and lookup errors share no base class
        raise CheckpointError(f"{name}: no such folder, and not to be had from the hub: {error}") from error


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: where tokenizer.json is missing, unreadable or made to exhaust memory.
    """
    file = resolve_folder(path_or_hub_id) / "tokenizer.json"
    content = read_json(file)
    try:
        check_tokenizer(content)
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()  # how a batch was last padded or cut is not what the ids mean
        tokenizer.no_truncation()
        num_added = len(tokenizer.encode("").ids)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if num_added > _MAX_ADDED_TOKENS:
        raise CheckpointError(f"{file}: adds {num_added} tokens to every prompt; at most {_MAX_ADDED_TOKENS}")
    return tokenizer


def tokenizer_hash(path_or_hub_id: str | Path) -> str:
    """Names what a tokenizer does: 16 hex digits of tokenizer.json's canonical content."""
    content = read_json(resolve_folder(path_or_hub_id) / "tokenizer.json")
    content.pop("padding", None)  # how a batch was last padded or cut, not what the ids mean
    content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def eos_token_ids(path_or_hub_id: str | Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, else config.json's. Empty where neither names one."""
    folder = resolve_folder(path_or_hub_id)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = token_id_list(read_json(folder / name).get("eos_token_id"))
            if ids:
                return ids
    return ()


def token_id_list(value: Any) -> tuple[int, ...]:
    """eos_token_id as config.json spells it (absent, one id or a list) as a tuple."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise CheckpointError(f"config.json: {value!r} is not a token id or a list of them")
    return ids


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: no {file.name}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return content
