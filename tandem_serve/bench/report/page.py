"""One self-contained page out of documents: no script, no font, no image from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tandem_serve.bench.report.documents import Documents, read_documents
from tandem_serve.bench.report.plots import Plot, all_plots
from tandem_serve.bench.report.table import Table
from tandem_serve.bench.report.tables import all_tables


def write_report(folder: Path, out: Path) -> int:
    """Reads a folder's documents and writes the page. Returns how many documents it shows.

    Raises:
        ConfigError: where there is nothing to report, or no matplotlib.
    """
    documents = read_documents(folder)
    environment = Environment(
        loader=PackageLoader("tandem_serve.bench", "report"), autoescape=True, undefined=StrictUndefined
    )
    sources = _sources(documents)
    page = environment.get_template("page.html.j2").render(
        title=folder.resolve().name,
        sections=_sections([name for name, _, _ in sources], all_tables(documents), all_plots(documents)),
        sources=sources,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return documents.count


OVERVIEW = "Side by side"


@dataclass
class _Section:
    """What there is of one document, its tables above its plots; titles are without the document's name."""

    tables: list[tuple[str, Table]] = field(default_factory=list)
    plots: list[tuple[str, Plot]] = field(default_factory=list)


def _sections(names: Sequence[str], tables: Sequence[Table], plots: Sequence[Plot]) -> dict[str, _Section]:
    """By document; first what is of several of them, or of the paper."""
    sections = {name: _Section() for name in (OVERVIEW, *names)}

    def place(title: str) -> tuple[_Section, str]:
        name, found, rest = title.partition(": ")
        return (sections[name], rest) if found and name in names else (sections[OVERVIEW], title)

    for table in tables:
        section, title = place(table.title)
        section.tables.append((title, table))
    for plot in plots:
        section, title = place(plot.title)
        section.plots.append((title, plot))
    return {name: section for name, section in sections.items() if section.tables or section.plots}


def _sources(documents: Documents) -> list[tuple[str, str, str]]:
    """(document, command, commit) of each document that says so."""
    everything: dict[str, dict[str, Any]] = {
        **documents.evals,
        **documents.decodes,
        **documents.engines,
        **documents.policies,
        **documents.standalones,
        **documents.routers,
    }
    sources = []
    for name, document in everything.items():
        origin = document.get("provenance", {})
        commit = origin.get("git_commit") or origin.get("commit") or ""
        sources.append((name, str(origin.get("command", "")), str(commit)[:12]))
    return sources
