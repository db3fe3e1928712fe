"""Where a pair lives: a folder that holds primary/, drafter/ and, for comparison, plain-drafter/."""

from __future__ import annotations

from pathlib import Path

from tandem_serve.errors import CheckpointError

DEMO = "demo"


def pair_folder(name: str) -> Path:
    """`demo` is the pair that comes with the repository; anything else a folder.

    Raises:
        CheckpointError: there is no such pair.
    """
    folder = Path(__file__).parents[2] / "models" / "demo" if name == DEMO else Path(name)
    if not (folder / "primary").is_dir():
        raise CheckpointError(f"pair {name!r}: {folder} has no folder primary/; `make train-demo` makes the demo pair")
    return folder
