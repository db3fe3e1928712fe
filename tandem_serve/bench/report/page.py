"""One self-contained page out of documents: no script, no font, no image from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tandem_serve.bench.report.documents import Documents, read_documents
from tandem_serve.bench.report.plots import all_plots
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
    page = environment.get_template("page.html.j2").render(
        title=folder.resolve().name,
        tables=all_tables(documents),
        plots=all_plots(documents),
        sources=_sources(documents),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return documents.count


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
