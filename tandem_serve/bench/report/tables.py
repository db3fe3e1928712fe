"""All of the report's tables, ours beside the paper's where the paper has one."""

from __future__ import annotations

from collections.abc import Iterator

from tandem_serve.bench.report import bench_tables as bench
from tandem_serve.bench.report import eval_tables as evals
from tandem_serve.bench.report.documents import Documents
from tandem_serve.bench.report.table import Table


def all_tables(documents: Documents) -> list[Table]:
    """Those that the documents have something for."""
    return [table for table in _tables(documents) if table.rows]


def _tables(documents: Documents) -> Iterator[Table]:
    if documents.evals:
        yield evals.paper_table_1()
    for name, document in documents.evals.items():
        yield evals.text_table(name, document)
        yield evals.drafting_table(name, document)
        yield evals.projection_table(name, document)
        yield evals.sweep_table(name, document)
        yield evals.peers_table(name, document)
    yield evals.configurations_table(documents.evals)
    yield evals.domains_table(evals.by_domain(documents.evals))
    if documents.decodes or documents.policies:
        yield bench.paper_table_2()
    yield bench.decodes_table(documents.decodes)
    yield bench.tandem_over_plain_table(documents.policies)
    yield bench.engines_table(documents.engines)
    for name, document in documents.standalones.items():
        yield bench.standalone_table(name, document)
    for name, document in documents.policies.items():
        yield bench.policies_table(name, document)
    for name, document in documents.routers.items():
        yield from bench.router_tables(name, document)
