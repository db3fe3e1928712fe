"""`tandem-serve k8s`: Kubernetes manifests from a cluster file."""

from __future__ import annotations

import typer
import yaml

from tandem_serve.cli_errors import reported
from tandem_serve.cli_serve import File

app = typer.Typer(help="Kubernetes manifests.", no_args_is_help=True)

_HEADER = "# Made by `tandem-serve k8s render {file}`: change that file, not this one.\n"


@app.callback()
def k8s() -> None:
    """Kubernetes manifests."""


@app.command("render")
def render(file: File) -> None:
    """Print a cluster as a RayService of KubeRay, with a worker group for each pool."""
    with reported():
        from tandem_serve.config import load_cluster_config
        from tandem_serve.serving.app import serve_config
        from tandem_serve.serving.cluster import SERVE_ENVIRONMENT
        from tandem_serve.serving.kubernetes import ray_service

        config = load_cluster_config(file)  # paths as they are: they lie in the pods
        service = ray_service(config, serve_config(config), SERVE_ENVIRONMENT)
        typer.echo(_HEADER.format(file=f"deployments/{file.name}"), nl=False)
        typer.echo(yaml.dump(service, Dumper=_dumper(), sort_keys=False, width=1000), nl=False)


def _dumper() -> type[yaml.SafeDumper]:
    """YAML for people: text of several lines as such, nothing by reference."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper
