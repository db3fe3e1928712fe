"""One table of the report, and one made of flat records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of text under columns, with a sentence about where they come from."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def records_table(title: str, what: str, records: dict[str, dict[str, Any]], note: str = "") -> Table:
    """Flat records by name, under the keys that any of them has."""
    columns = list(dict.fromkeys(key for record in records.values() for key in record))
    rows = [[name, *(as_cell(record.get(key, "")) for key in columns)] for name, record in records.items()]
    return Table(title, (what, *columns), rows, note)


def as_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
