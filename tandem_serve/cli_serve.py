"""`tandem-serve up|build|status`, and the pools as plain processes."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem_serve.cli_complete import API_KEY, authorization_header, with_scheme
from tandem_serve.cli_errors import interruptible, reported

File = Annotated[Path, typer.Argument(help="A cluster file, e.g. deployments/demo.yaml.", show_default=False)]
Model = Annotated[str, typer.Option(help="A folder, a hub id, or `demo`.", show_default=False)]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one, as announced.")]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
MetricsPort = Annotated[int | None, typer.Option(help="Serve Prometheus here. Default: nowhere.")]
Observability = Annotated[
    Path | None, typer.Option(help="A cluster file, for its observability section: traces and logs.")
]
Threads = Annotated[int, typer.Option(min=1, help="torch threads.")]
TlsFolder = Annotated[
    str | None, typer.Option(help="tls.crt, tls.key, ca.crt for mutual TLS between pools. Default: plain text.")
]
Addresses = Annotated[list[str] | None, typer.Option(help="host:port; may be given several times.")]

# ------------------------------------------------------------------ clusters


def up(file: File) -> None:
    """Run a cluster on this machine, on a local Ray, until Ctrl-C."""
    from rich.console import Console

    from tandem_serve.serving.cluster import load_cluster, local_cluster

    console = Console(stderr=True)
    with reported():
        config = load_cluster(file)
        try:
            with (
                interruptible(),
                console.status("") as spinner,
                local_cluster(config, spinner.update) as endpoints,
            ):
                spinner.stop()
                typer.echo(f"{config.name} is up: model {config.router.model_name}")
                typer.echo(f"  OpenAI API  {endpoints.http}/v1")
                typer.echo(f"  gRPC        {endpoints.grpc}")
                typer.echo(f"  Ray         {endpoints.ray}  (tandem-serve apply {file} --address {endpoints.ray})")
                typer.echo("Ctrl-C drains and ends it.")
                try:
                    threading.Event().wait()
                finally:
                    spinner.start()
        except KeyboardInterrupt:
            typer.echo(f"{config.name} is down")


def build(file: File) -> None:
    """Print a cluster as a Ray Serve config, for `serve deploy` or a RayService's serveConfigV2."""
    import yaml

    from tandem_serve.serving.app import serve_config
    from tandem_serve.serving.cluster import load_cluster

    with reported():
        config = load_cluster(file)
        typer.echo(yaml.safe_dump(serve_config(config), sort_keys=False), nl=False)


def status(
    url: Annotated[str, typer.Option(help="A router's HTTP address.")] = "http://127.0.0.1:8000",
) -> None:
    """Show both pools as a router sees them."""
    from rich.console import Console
    from rich.table import Table

    with reported():
        overview = _get_json(f"{with_scheme(url)}/status")
    primaries = Table("primary", "running", "waiting", "KV cache", "from this router", title=f"{overview['model']}")
    for primary in overview["primaries"]:
        load = ["-", "-", "does not answer"]
        if found := primary["status"]:
            load = [str(found[f"num_requests_{state}"]) for state in ("running", "waiting")]
            load.append(f"{found['kv_cache_usage']:.0%}")
        primaries.add_row(primary["name"], *load, str(primary["num_sequences"]))
    drafters = Table("drafter", "linked primaries", "paired by this router")
    for drafter in overview["drafters"]:
        linked = ", ".join(drafter["linked_primaries"]) or "none"
        drafters.add_row(drafter["address"], linked, str(drafter["num_sequences"]))
    Console().print(primaries, drafters)


# ------------------------------------------------------------------ plain processes


def drafter(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 0,
    dtype: DtypeOption = "float32",
    device: Device = "cpu",
    num_threads: Threads = 1,
    max_num_seqs: int = 256,
    kv_cache_tokens: int = 262_144,
    max_block_length: int = 32,
    idle_timeout_s: float = 60.0,
    representation_dtype: Annotated[str, typer.Option(help="On the wire: bf16, int8 or f32.")] = "bf16",
    metrics_port: MetricsPort = None,
    observability: Observability = None,
    tls_folder: TlsFolder = None,
) -> None:
    """Run one drafter as a plain process."""
    with reported():
        from tandem_serve.config import DrafterPool, load_observability
        from tandem_serve.serving.processes import run_drafter

        engine = {
            "dtype": dtype,
            "device": device,
            "max_num_seqs": max_num_seqs,
            "kv_cache_tokens": kv_cache_tokens,
            "max_block_length": max_block_length,
            "idle_timeout_s": idle_timeout_s,
            "representation_dtype": representation_dtype,
        }
        pool = _pool(
            DrafterPool,
            model=_model(model, "drafter"),
            engine=engine,
            resources={"num_threads": num_threads},
            tls_folder=tls_folder,
        )
        asyncio.run(
            run_drafter(
                pool,
                host=host,
                port=port,
                metrics_port=metrics_port,
                observability=load_observability(observability),
                announce=typer.echo,
            )
        )


def primary(
    model: Model,
    drafter: Addresses = None,
    host: Host = "127.0.0.1",
    port: Port = 0,
    dtype: DtypeOption = "float32",
    device: Device = "cpu",
    num_threads: Threads = 1,
    max_num_seqs: int = 32,
    max_num_waiting: int = 256,
    max_num_batched_tokens: int = 512,
    kv_cache_tokens: int = 65_536,
    max_model_len: int | None = None,
    engine: Annotated[str, typer.Option(help="torch, or vllm where it is installed.")] = "torch",
    taps: Annotated[str, typer.Option(help="vllm: layers that drafters read, e.g. 8,16. Default: none.")] = "",
    adapts: Annotated[bool, typer.Option(help="vllm: block lengths by measured costs.")] = True,
    block_length: Annotated[int, typer.Option(help="Drafts a round where a request does not say.")] = 5,
    draft_timeout_s: float = 0.5,
    metrics_port: MetricsPort = None,
    observability: Observability = None,
    tls_folder: TlsFolder = None,
) -> None:
    """Run one primary as a plain process."""
    with reported():
        from tandem_serve.config import PrimaryPool, load_observability
        from tandem_serve.serving.processes import run_primary

        fields: dict[str, Any] = {
            "engine": engine,
            "dtype": dtype,
            "max_num_seqs": max_num_seqs,
            "max_num_waiting": max_num_waiting,
            "max_num_batched_tokens": max_num_batched_tokens,
            "kv_cache_tokens": kv_cache_tokens,
            "max_model_len": max_model_len,
            "block_length": block_length,
            "draft_timeout_s": draft_timeout_s,
        }
        if engine == "vllm":
            fields |= {"taps": taps.split(",") if taps else [], "adapts": adapts}
        else:
            fields["device"] = device
        pool = _pool(
            PrimaryPool,
            model=_model(model, "primary"),
            engine=fields,
            resources={"num_threads": num_threads},
            tls_folder=tls_folder,
        )
        asyncio.run(
            run_primary(
                pool,
                drafter or [],
                host=host,
                port=port,
                metrics_port=metrics_port,
                observability=load_observability(observability),
                announce=typer.echo,
            )
        )


def router(
    model: Annotated[
        str, typer.Option(help="Whose tokenizer to use: a folder, a hub id, or `demo`.", show_default=False)
    ],
    primary: Annotated[list[str], typer.Option(help="host:port; may be given several times.", show_default=False)],
    drafter: Addresses = None,
    model_name: Annotated[str, typer.Option(help="What clients call the model.")] = "tandem",
    host: Host = "127.0.0.1",
    http_port: Port = 8000,
    grpc_port: Port = 9000,
    metrics_port: MetricsPort = None,
    observability: Observability = None,
    tls_folder: TlsFolder = None,
    api_keys_file: Annotated[str | None, typer.Option(help="From `keys new`. Default: open to all.")] = None,
) -> None:
    """Run one router as a plain process."""
    with reported():
        from tandem_serve.config import RouterPool, load_observability
        from tandem_serve.serving.processes import run_router

        pool = _pool(
            RouterPool,
            model_name=model_name,
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            tls_folder=tls_folder,
            api_keys_file=api_keys_file,
        )
        primaries, drafters = primary, drafter or []
        asyncio.run(
            run_router(
                pool,
                _model(model, "primary"),
                primaries,
                drafters,
                metrics_port=metrics_port,
                observability=load_observability(observability),
                announce=typer.echo,
            )
        )


def _model(reference: str, role: str) -> str:
    """A model's folder or hub id; `demo` is the committed pair's model of that role."""
    from tandem_serve.models.pairs import DEMO, pair_folder

    return str(pair_folder(DEMO) / role) if reference == DEMO else reference


def _pool(kind: Any, **fields: Any) -> Any:
    """A pool's configuration. Raises ConfigError, naming the option."""
    from pydantic import ValidationError

    from tandem_serve.errors import ConfigError

    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = (f"--{str(e['loc'][-1]).replace('_', '-')}: {e['msg']}" for e in error.errors())
        raise ConfigError("; ".join(problems)) from error


def _get_json(url: str) -> Any:
    import json
    import urllib.request

    from tandem_serve.errors import Unavailable

    try:
        request = urllib.request.Request(url, headers=authorization_header())
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)
    except (OSError, ValueError) as error:
        hint = f"; set {API_KEY}" if getattr(error, "code", None) == 401 else ""
        raise Unavailable(f"{url}: {error}{hint}") from error
