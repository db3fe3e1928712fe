"""`eval` on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tandem_serve.bench.report.eval_tables import accepted


def print_eval(figures: dict[str, Any]) -> None:
    """The document of evaluate_pair: one table of text, one of drafting a temperature, one of couplings."""
    primary, plan = figures["primary"], figures["plan"]
    console = Console()
    console.print(
        f"Primary: {primary['num_parameters'] / 1e6:.1f} M parameters, loss {primary['loss']:.3f}, "
        f"accuracy {primary['accuracy']:.1f} % on {primary['num_tokens']:,.0f} tokens of {plan['data']}"
    )
    _print_text(console, figures)
    for temperature in plan["temperatures"]:
        _print_drafting(console, figures, f"{temperature:g}")
    if plan["couplings"]:
        _print_couplings(console, figures)


def _print_text(console: Console, figures: dict[str, Any]) -> None:
    table = _table("Held-out text", "drafter", "M", "block", "accuracy", "agreement", "CE", "TV")
    for name, drafter in figures["drafters"].items():
        for length, f in drafter.get("text", {}).get("block_lengths", {}).items():
            size = f"{drafter['num_parameters'] / 1e6:.2f}"
            row = [f"{f['accuracy']:.2f}", f"{f['agreement']:.2f}"]
            table.add_row(name, size, length, *row, f"{f['cross_entropy']:.3f}", f"{f['total_variation']:.3f}")
    console.print(table)


def _print_drafting(console: Console, figures: dict[str, Any], temperature: str) -> None:
    columns = ("drafter", "block", "accepted", "by position", "agreement", "ML runs", "MS runs")
    table = _table(f"The primary's own texts, temperature {temperature}, per response", *columns)
    for name, drafter in figures["drafters"].items():
        for length, f in drafter["drafting"][temperature]["block_lengths"].items():
            positions = " ".join(f"{share:.2f}".lstrip("0") for share in f["accepted_per_position"][:8])
            table.add_row(
                name,
                length,
                accepted(f, digits=2),
                positions,
                f"{f['agreement']:.1f}",
                f"{f['primary_runs_per_response']:.1f}",
                f"{f['drafter_runs_per_response']:.1f}",
            )
    console.print(table)


def _print_couplings(console: Console, figures: dict[str, Any]) -> None:
    token = ("rejection", "shared_noise", "bound", "greedy_draft", "sampled_draft")
    block = ("block_verification", "rejection", "shared_noise")
    columns = [name.replace("_", " ") for name in token] + [f"block: {name.replace('_', ' ')}" for name in block]
    table = _table("Chance that a draft is accepted, and accepted drafts a block", "drafter", "T", *columns)
    for name, drafter in figures["drafters"].items():
        for temperature, f in drafter.get("couplings", {}).items():
            values = [f"{f['token'][key]:.3f}" for key in token] + [f"{f['block'][key]:.2f}" for key in block]
            table.add_row(name, temperature, *values)
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
