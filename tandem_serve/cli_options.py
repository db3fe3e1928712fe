"""What several commands take and write alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

PairOption = Annotated[str, typer.Option(help="`demo`, or a folder that holds primary/, drafter/ and plain-drafter/.")]
PromptsOption = Annotated[
    str,
    typer.Option(
        help="JSONL, or text to cut prompts from: a file, a folder, or `heldout`, what the pair was not trained on."
    ),
]
FieldOption = Annotated[str, typer.Option(help="Which key of a JSONL line is the prompt.")]
InflateOption = Annotated[
    int, typer.Option(min=1, max=64, help="Make the primary so many times as deep, same outputs.")
]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Torch threads.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")]


def write_json(file: Path | None, figures: dict[str, Any]) -> None:
    """Writes a benchmark's document, where a file was asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
