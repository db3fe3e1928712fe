"""What a run leaves on disk: resumable state, a JSONL log, provenance. A kill loses no more than a minute."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tandem_serve.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)

_LOCK = "lock"
_STATE, _LOG, _PROVENANCE = "training_state.pt", "log.jsonl", "provenance.json"


class RunFolder:
    """The files of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def lock(self) -> None:
        """Keeps other processes' runs out of this folder until this object, or the process, is gone.

        Raises:
            ConfigError: where another one is at work in it.
        """
        self._held = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.path}: another training is at work in this folder; end it or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            _log.warning("%s: cannot be locked: see to it that one training alone works there", self.path)

    @property
    def has_state(self) -> bool:
        return (self.path / _STATE).is_file()

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replaces the state atomically: after a kill the file is the old one or the new one, never a part."""
        fresh = self.path / f".{_STATE}.new"
        with fresh.open("wb") as handle:
            torch.save(dict(state), handle)
            handle.flush()
            os.fsync(handle.fileno())
        fresh.replace(self.path / _STATE)

    def load_state(self) -> dict[str, Any]:
        """Reads tensors and plain values only: a state file cannot run code.

        Raises:
            CheckpointError: where it is damaged.
        """
        try:
            state: dict[str, Any] = torch.load(self.path / _STATE, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises a dozen types for a damaged file
            raise CheckpointError(f"{self.path / _STATE}: cannot be read: {error}") from error
        return state

    def clear(self) -> None:
        """Starts over: forgets state, log and tokenizer. A finished model stays until another replaces it."""
        for name in (_STATE, _LOG, _PROVENANCE):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tokenizer", ignore_errors=True)

    def log(self, record: Mapping[str, Any]) -> None:
        with (self.path / _LOG).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        file = self.path / _LOG
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []

    def truncate_log(self, num_steps: int) -> None:
        """Drops what was logged of steps >= num_steps (they will run again) and a line that a kill cut in two."""
        file = self.path / _LOG
        if not file.is_file():
            return
        kept = []
        for line in file.read_text("utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] < num_steps:
                kept.append(line + "\n")
        fresh = file.with_name(f".{_LOG}.new")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(file)

    def write_provenance(self, details: Mapping[str, Any]) -> None:
        """Adds how this run came about to what the details say; they have the last word, and the last resumption."""
        record = {**provenance(), **details}
        (self.path / _PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def stamp(self, model_folder: Path, **details: Any) -> None:
        """Copies the provenance, and what is this model's alone, beside its weights: it goes where the model goes."""
        record = {**self.read_provenance(), **details}
        (model_folder / _PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def read_provenance(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.path / _PROVENANCE).read_text("utf-8"))
        return record


def provenance() -> dict[str, Any]:
    """Command, commit and versions of this process. The command is shown without the interpreter's own path."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _git_commit() -> str:
    """The commit of the source tree that runs, with `+changes` where files differ; "unknown" outside a clone."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
