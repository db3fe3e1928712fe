"""What `eval` takes on its command line, as values."""

from __future__ import annotations

from collections.abc import Sequence

from tandem_serve.errors import ConfigError


def parse_block_lengths(text: str) -> tuple[int, ...]:
    """`1..32`, `2,5,8` or a mixture, ascending and each once.

    Raises:
        ConfigError: for anything else.
    """
    lengths: set[int] = set()
    try:
        for part in text.split(","):
            low, dots, high = part.partition("..")
            lengths.update(range(int(low), int(high if dots else low) + 1))
    except ValueError:
        lengths = set()
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= 32:
        raise ConfigError(f"block lengths {text!r}: expected numbers and ranges of 1 to 32, such as 1..8 or 2,5")
    return tuple(sorted(lengths))


def parse_temperatures(text: str) -> tuple[float, ...]:
    """`0,0.8` as numbers; ConfigError for anything else."""
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 2 for value in values):
        raise ConfigError(f"temperatures {text!r}: expected numbers of 0 to 2, such as 0,0.8")
    return values


def named_folders(drafters: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER each; ConfigError for anything else."""
    named = {}
    for drafter in drafters:
        name, equals, folder = drafter.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"drafter {drafter!r}: expected NAME=FOLDER")
        named[name] = folder
    return named
