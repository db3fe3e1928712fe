"""All of the report's tables, ours beside the paper's where the paper has one."""

from __future__ import annotations

from collections.abc import Iterator

from tandem_serve.bench.report import bench_tables, eval_tables
from tandem_serve.bench.report.documents import Documents
from tandem_serve.bench.report.table import Table


def all_tables(documents: Documents) -> list[Table]:
    """Those that the documents have something for."""
    return [table for table in _tables(documents) if table.rows]


def _tables(documents: Documents) -> Iterator[Table]:
    if documents.evals:
        yield eval_tables.paper_table_1()
    for name, document in documents.evals.items():
        yield eval_tables.text_table(name, document)
        yield eval_tables.drafting_table(name, document)
        yield eval_tables.projection_table(name, document)
        yield eval_tables.sweep_table(name, document)
        yield eval_tables.peers_table(name, document)
    yield eval_tables.configurations_table(documents.evals)
    yield eval_tables.domains_table(eval_tables.by_domain(documents.evals))
    if documents.decodes or documents.policies:
        yield bench_tables.paper_table_2()
    yield bench_tables.decodes_table(documents.decodes)
    yield bench_tables.tandem_over_plain_table(documents.policies)
    yield bench_tables.engines_table(documents.engines)
    for name, document in documents.standalones.items():
        yield bench_tables.standalone_table(name, document)
    for name, document in documents.policies.items():
        yield bench_tables.policies_table(name, document)
    for name, document in documents.routers.items():
        yield from bench_tables.router_tables(name, document)
