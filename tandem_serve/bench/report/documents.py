"""Finds the JSON documents that a report is made of, and tells them apart. What it does not know it leaves out.

| document | written by | told by |
|---|---|---|
| eval | `eval --json` | `kind` = eval |
| decode | `bench decode --json` | `modes`, `ratios` and `options` |
| engines | `bench engines --json` | likewise, with modes by concurrency |
| standalone | `bench standalone --json` | `kind` = standalone |
| policies | `bench policies --json` | `cells` |
| router | `train router` | `calibration` |
| training | every `train` | log.jsonl, lines with `step`, `tokens` and `losses` |

A router's `calibration` holds a predictor's `bins`, each `{"score", "accepted", "count"}`, and its scalars (`auc`,
`brier`, ...) by the predictor's name; its `policies` flat records by the policy's name. Each of a policies document's
`cells` is a load (`batch`, `n`, `temperature`) with `policies` of its own. Any key may be missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem_serve.errors import ConfigError


@dataclass
class Documents:
    """By the name of their file, relative to the folder, without suffix."""

    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    decodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    routers: dict[str, dict[str, Any]] = field(default_factory=dict)
    standalones: dict[str, dict[str, Any]] = field(default_factory=dict)
    trainings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def count(self) -> int:
        return sum(map(len, vars(self).values()))


def read_documents(folder: Path) -> Documents:
    """Everything below a folder, in the order of names.

    Raises:
        ConfigError: where there is nothing to report.
    """
    found = Documents()
    for file in sorted(folder.rglob("*.json")):
        document = _read(file)
        name = str(file.relative_to(folder).with_suffix(""))
        if document.get("kind") == "eval":
            found.evals[name] = document
        elif document.get("kind") == "standalone":
            found.standalones[name] = document
        elif isinstance(document.get("calibration"), dict):
            found.routers[name] = document
        elif isinstance(document.get("cells"), list):
            found.policies[name] = document
        elif {"modes", "ratios", "options"} <= document.keys():
            of_one_load = any("tokens_per_s" in mode for mode in document["modes"].values())
            (found.decodes if of_one_load else found.engines)[name] = document
    for file in sorted(folder.rglob("log.jsonl")):
        records = [r for r in _read_lines(file) if {"step", "tokens", "losses"} <= r.keys()]
        if records:
            found.trainings[str(file.parent.relative_to(folder))] = records
    if not found:
        raise ConfigError(f"{folder}: no document of eval, bench or train in it")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    records = []
    for line in file.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # a line that a kill cut in two
    return [record for record in records if isinstance(record, dict)]
