"""`tandem-serve demo`: the whole product in a minute or two, on this machine, leaving nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem_serve.cli_errors import reported

_PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self.items = []

    def push(self, item):
'''
DEMO_FILE = Path(__file__).parents[1] / "deployments" / "demo.yaml"


def demo(
    file: Annotated[Path, typer.Argument(help="A cluster file.")] = DEMO_FILE,
    limit: Annotated[int, typer.Option(min=1, help="Held-out prompts to measure on.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion.")] = 96,
) -> None:
    """Start a cluster on a local Ray, stream a completion, compare plain with tandem decoding, and end it.

    Primary and drafter are replicas in processes of their own; ports are free ones. `tandem-serve up` keeps a cluster.
    """
    from rich.console import Console

    from tandem_serve.bench.cluster import measure_cluster
    from tandem_serve.bench.prompts import held_out_prompts
    from tandem_serve.bench.tables import ProgressBar, print_cluster
    from tandem_serve.cli_complete import complete
    from tandem_serve.models.checkpoint import load_tokenizer
    from tandem_serve.serving.cluster import load_cluster, local_cluster

    console = Console(stderr=True)
    with reported():
        config = load_cluster(file)
        router = config.router.model_copy(update={"http_port": 0, "grpc_port": 0})
        config = config.model_copy(update={"router": router})
        primary = Path(config.primary.model)
        prompts = held_out_prompts(load_tokenizer(primary), primary, limit, num_tokens=128)
        with console.status("") as spinner, local_cluster(config, spinner.update) as endpoints:
            spinner.stop()
            typer.echo(f"{config.name} is up at {endpoints.http}/v1; one completion, accepted drafts in green:\n")
            complete(_PROMPT, url=endpoints.http, max_tokens=max_tokens)
            typer.echo()
            with ProgressBar("plain against tandem") as bar:
                figures = measure_cluster(endpoints.http, prompts, max_tokens, bar.expect(2 * len(prompts)))
            print_cluster(figures)
            spinner.start()
    typer.echo("The cluster is down. `tandem-serve up deployments/demo.yaml` starts one that stays.")
