"""`tandem-serve validate|schema|apply`: the cluster file before and while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tandem_serve.cli_errors import reported

if TYPE_CHECKING:
    from tandem_serve.serving.plan import Change

File = Annotated[Path, typer.Argument(help="A cluster file, e.g. deployments/demo.yaml.", show_default=False)]
Address = Annotated[
    str, typer.Option(help="Ray's address, as `tandem-serve up` prints it; `auto`: RAY_ADDRESS, or what runs here.")
]


def validate(
    file: File,
    models: Annotated[bool, typer.Option(help="Also check that the models load and belong together.")] = True,
) -> None:
    """Check a cluster file: every field, and that primary and drafter were made for each other."""
    from tandem_serve.serving.cluster import check_models, load_cluster

    with reported():
        config = load_cluster(file)
        if models:
            check_models(config)
        typer.echo(f"{file} is valid: {config.name}")


def schema() -> None:
    """Print the cluster file's JSON schema (committed as deployments/schema.json, for editors)."""
    from tandem_serve.config import ClusterConfig

    typer.echo(json.dumps(ClusterConfig.model_json_schema(), indent=2))


def apply(
    file: File,
    address: Address = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
) -> None:
    """Bring a running cluster to what a file says, and say first what that will do.

    Replica counts, autoscaling, block length and limits change in place. Everything else restarts the pools that it
    belongs to, replica by replica; the others run on, and no stream is cut.
    """
    from tandem_serve.serving.cluster import apply_cluster, load_cluster

    with reported():
        config = load_cluster(file)
        changes = apply_cluster(config, address, dry_run=dry_run, show=_show)
        if changes and not dry_run:
            typer.echo(f"{config.name} runs as {file} says")


def _show(changes: list[Change]) -> None:
    for change in changes:
        what = f"{change.application}: {change.field}".removesuffix(": ")
        typer.echo(f"{what}: {change.before} -> {change.after}  [{change.effect}]")
    if not changes:
        typer.echo("nothing to change")
