"""One table of the report, and one made of flat records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of text under columns, with a sentence about where they come from."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def records_table(title: str, what: str, records: Iterable[tuple[str, dict[str, Any]]], note: str = "") -> Table:
    """Flat records and their names, under the keys that any of them has."""
    named = list(records)
    columns = list(dict.fromkeys(key for _, record in named for key in record))
    rows = [[name, *(as_cell(record.get(key, "")) for key in columns)] for name, record in named]
    return Table(title, (what, *(column.replace("_", " ") for column in columns)), rows, note)


def as_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
