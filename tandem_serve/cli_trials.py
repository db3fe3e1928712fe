"""`tandem-serve chaos|simulate`: a cluster put to the test on this machine, in earnest or on paper."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from tandem_serve.cli_errors import reported

CHAOS_FILE = Path(__file__).parents[1] / "deployments" / "chaos.yaml"


def chaos(
    file: Annotated[Path, typer.Argument(help="A cluster file.")] = CHAOS_FILE,
    faults: Annotated[int, typer.Option(min=0, help="How many; with 13, one of each kind.")] = 13,
    streams: Annotated[int, typer.Option(min=1, help="Clients that stream at the same time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the order of faults, their targets, and all requests.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of the longest completions.")] = 120,
    out: Annotated[Path | None, typer.Option("--json", help="Where to write the report.")] = None,
) -> None:
    """Break a cluster of several (simulated) nodes while clients stream, and compare every token with a calm run.

    Exit status 1 where a text has changed, an accepted request was lost, or the cluster did not become whole again.
    """
    from rich.console import Console

    from tandem_serve.serving.chaos.trial import TrialSize, run_trial
    from tandem_serve.serving.cluster import load_cluster

    with reported():
        size = TrialSize(num_faults=faults, num_streams=streams, max_tokens=max_tokens, seed=seed)
        console = Console(stderr=True)
        # Ray would print why each node died, pages of it.
        with console.status("") as spinner, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            progress = spinner.update if console.is_terminal else console.print
            report = run_trial(load_cluster(file), size, progress)
    for fault in report["faults"]:
        recovery = "not whole again" if fault["recovery_s"] is None else f"whole after {fault['recovery_s']} s"
        typer.echo(f"{fault['at_s']:7.1f} s  {fault['kind']:18} {recovery}, longest pause {fault['longest_pause_s']} s")
    figures = ("accepted", "completed", "changed", "resumed_by_client", "refused", "tokens", "duration_s")
    typer.echo(", ".join(f"{name} {report[name]}" for name in figures))
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
    is_lost = report["completed"] != report["accepted"] or report["changed"] or report["calm_incomplete"]
    if is_lost or any(fault["recovery_s"] is None for fault in report["faults"]):
        raise typer.Exit(1)


def simulate(
    file: Annotated[Path, typer.Argument(help="A cluster file: engine limits and autoscaling targets.")],
    trace: Annotated[Path, typer.Option(help="JSON lines: at_s, prompt_tokens, output_tokens.", show_default=False)],
    pools: Annotated[str | None, typer.Option(help="Other bounds, e.g. primary=1:8,drafter=1:4.")] = None,
    costs: Annotated[Path | None, typer.Option(help="Measured costs (YAML). Default: the demo pair on a core.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Where to write the report.")] = None,
    image: Annotated[Path | None, typer.Option("--plot", help="Where to draw load and pool sizes.")] = None,
) -> None:
    """Simulate a cluster under a trace of requests: how its pools would grow and shrink, and what clients would see."""
    import yaml
    from pydantic import ValidationError

    from tandem_serve.config import load_cluster_config
    from tandem_serve.errors import ConfigError
    from tandem_serve.serving.planning import Costs, plot, read_trace, with_bounds
    from tandem_serve.serving.simulate import simulate

    with reported():
        config = load_cluster_config(file)
        if pools is not None:
            config = with_bounds(config, pools)
        try:
            measured = Costs.model_validate(yaml.safe_load(costs.read_text()) if costs is not None else {})
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{costs}: {error}") from error
        report = simulate(config, measured, read_trace(trace))
        if image is not None:
            plot(report, image)
    if out is not None:
        out.write_text(json.dumps(report) + "\n")
    for name, unit in (("first_token_s", "first token"), ("seconds_per_token", "a token")):
        typer.echo(f"{unit}: " + ", ".join(f"{key} {value * 1e3:.0f} ms" for key, value in report[name].items()))
    for pool, plural in (("primary", "primaries"), ("drafter", "drafters")):
        sizes = [point[plural] for point in report["series"]]
        spent = report["replica_seconds"][pool]
        typer.echo(f"{plural}: {min(sizes)} to {max(sizes)}, {spent:.0f} replica seconds")
    typer.echo(f"completed {report['completed']}, refused {report['refused']}")
