"""Where training text comes from: files, folders, this interpreter's standard library, or a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem_serve.errors import ConfigError

STDLIB = "stdlib"
_FEW = 20
# Packages beside the library (not part of it), tests (they would outweigh the rest two to one) and generated tables.
_STDLIB_SKIPPED = frozenset({"site-packages", "test", "tests", "encodings", "pydoc_data", "__phello__"})
_TEXT_SUFFIXES = frozenset({".py", ".txt", ".md", ".rst", ".json", ".jsonl", ".c", ".h", ".js", ".ts", ".go", ".rs"})

# Modules kept out of training, to measure on. All of them are in every CPython since 3.11.
STDLIB_HELD_OUT: tuple[str, ...] = (
    "asyncio/locks.py",
    "asyncio/queues.py",
    "bisect.py",
    "calendar.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "email/message.py",
    "fractions.py",
    "heapq.py",
    "html/parser.py",
    "http/cookies.py",
    "json/decoder.py",
    "json/encoder.py",
    "multiprocessing/pool.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "string.py",
    "textwrap.py",
    "urllib/robotparser.py",
    "wsgiref/handlers.py",
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name it goes by: a path relative to its source, or a row number."""

    name: str
    text: str


def read_documents(source: str) -> list[Document]:
    """Reads a source, in an order that does not depend on the file system.

    Args:
        source: `stdlib` (the running interpreter's, *.py, without tests), a text file, a folder of text files, or a
            Hugging Face dataset as `owner/name[:split[:column]]` (split `train`, column `text` by default).

    Raises:
        ConfigError: where there is nothing to read.
    """
    path = Path(source).expanduser()
    if source == STDLIB:
        documents = _read_folder(stdlib_folder(), frozenset({".py"}), _STDLIB_SKIPPED)
    elif path.is_file():
        documents = [Document(path.name, _read_text(path))]
    elif path.is_dir():
        documents = _read_folder(path, _TEXT_SUFFIXES, frozenset({".git", "__pycache__", "node_modules"}))
    else:
        documents = _read_dataset(source)
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise ConfigError(f"data source {source!r}: no text in it")
    return documents


def stdlib_folder() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_held_out(
    documents: Iterable[Document], names: Sequence[str] | None, fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Splits into (training, held out): the named documents, or where `names` is None about `fraction` of them.

    The choice by fraction hashes names, so it stays the same when documents come or go. Documents that are too few to
    choose from, so that one in twenty would be a matter of luck, are cut instead.
    """
    everything = list(documents)
    if names is None and len(everything) < _FEW:
        return cut_ends(everything, fraction)
    wanted = set(names or ())
    if names is None:
        first = min(everything, key=lambda d: _unit_hash(d.name))
        wanted = {first.name} | {d.name for d in everything if _unit_hash(d.name) < fraction}
    return [d for d in everything if d.name not in wanted], [d for d in everything if d.name in wanted]


def cut_ends(documents: Iterable[Document], fraction: float = 0.05) -> tuple[list[Document], list[Document]]:
    """(training, held out): of every document its end is held out."""
    cuts = [(d.name, d.text, int(len(d.text) * (1 - fraction))) for d in documents]
    training = [Document(name, text[:cut]) for name, text, cut in cuts]
    return training, [Document(name, text[cut:]) for name, text, cut in cuts if text[cut:].strip()]


def corpus_hash(documents: Iterable[Document]) -> str:
    """16 hex digits that name the texts and their order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{len(document.text)}\0".encode())
        digest.update(document.text.encode())
    return digest.hexdigest()[:16]


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _read_folder(folder: Path, suffixes: frozenset[str], skipped: frozenset[str]) -> list[Document]:
    found = []
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if file.suffix in suffixes and not skipped.intersection(parts) and not parts[0].startswith("config-"):
            found.append(("/".join(parts), file))
    return [Document(name, _read_text(file)) for name, file in sorted(found) if file.is_file()]


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _read_dataset(source: str) -> list[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            f"data source {source!r}: no such file or folder; to read it as a Hugging Face dataset, "
            "install tandem-serve[train]"
        ) from None
    name, _, rest = source.partition(":")
    split, _, column = rest.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
        return [Document(str(i), str(row[column or "text"])) for i, row in enumerate(rows)]
    except Exception as error:  # datasets raises a type of its own for each of its many failures
        raise ConfigError(f"data source {source!r}: neither a path nor a dataset that can be read: {error}") from error
