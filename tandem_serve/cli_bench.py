"""`tandem-serve bench`: what it costs and what it gains, as tables and JSON."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem_serve.cli_options import (
    FieldOption,
    InflateOption,
    JsonOption,
    PairOption,
    PromptsOption,
    ThreadsOption,
    write_json,
)

app = typer.Typer(
    no_args_is_help=True, help="Measure: every claim a ratio within one run, on text nothing was trained on."
)


class Transport(StrEnum):
    LOCAL = "local"
    GRPC = "grpc"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.command()
def decode(
    pair: PairOption = "demo",
    prompts: PromptsOption = "heldout",
    field: FieldOption = "prompt",
    limit: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 40,
    modes: Annotated[
        str, typer.Option(help="Of plain, plain-drafter, tandem; tandem@grpc: over gRPC whatever --transport says.")
    ] = "plain,plain-drafter,tandem",
    block_length: Annotated[int, typer.Option(min=1, max=32, help="Drafts a round.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy; else seeded by prompt.")] = 0.0,
    transport: Annotated[
        Transport, typer.Option(help="grpc: the drafter in a process and on a core of its own.")
    ] = Transport.LOCAL,
    inflate: InflateOption = 1,
    primary_dtype: Dtype = Dtype.FLOAT32,
    drafter_dtype: Dtype = Dtype.FLOAT32,
    num_threads: ThreadsOption = 1,
    json_file: JsonOption = None,
) -> None:
    """Plain, plain-drafter and tandem decoding at batch 1, interleaved prompt by prompt.

    tokens/s leaves out the prompt's own pass: first token to last. Only float32 promises tokens identical to plain.
    """
    from tandem_serve.bench.run_decode import MODES, DecodeOptions, run_decode
    from tandem_serve.bench.tables import ProgressBar, print_decode
    from tandem_serve.cli_errors import reported
    from tandem_serve.models.pairs import pair_folder

    chosen = tuple(name.strip() for name in modes.split(","))
    if unknown := sorted({*chosen} - {*MODES}):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(MODES)}", param_hint="--modes")
    with reported():
        options = DecodeOptions(
            pair=pair_folder(pair),
            prompts=prompts,
            field=field,
            limit=limit,
            modes=chosen,
            block_length=block_length,
            max_tokens=max_tokens,
            temperature=temperature,
            transport=transport.value,
            inflate=inflate,
            primary_dtype=primary_dtype.value,
            drafter_dtype=drafter_dtype.value,
            num_threads=num_threads,
        )
        with ProgressBar("decoding") as bar:
            figures = run_decode(options, bar.expect)
    print_decode(figures)
    write_json(json_file, figures)


@app.command()
def policies(
    pair: PairOption = "demo",
    prompts: PromptsOption = "heldout",
    field: FieldOption = "prompt",
    limit: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 40,
    names: Annotated[
        str,
        typer.Option(
            "--policies",
            help="Of fixed-N, entropy, router, optimal; fixed-1-8 is eight of them. plain-drafter:fixed-1-8 is SPEED "
            "with the plain drafter.",
        ),
    ] = "fixed-1-8,entropy,router,optimal",
    batch: Annotated[str, typer.Option(help="Requests at once.")] = "1,8",
    samples: Annotated[str, typer.Option(help="Completions a request; several only at a temperature above 0.")] = "1,4",
    temperature: Annotated[str, typer.Option(help="0 is greedy.")] = "0,0.8",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion.")] = 128,
    steady: Annotated[
        bool,
        typer.Option(
            help="The next request takes the place of the first to end, and only steps that find all places decoding "
            "count. Else requests begin together, and the time is that until the last of them ends.",
        ),
    ] = False,
    inflate: InflateOption = 1,
    num_threads: ThreadsOption = 1,
    json_file: JsonOption = None,
) -> None:
    """Fixed block lengths against adaptive policies, each at its tokens/s over the best fixed length's.

    Every policy decodes the same requests, a step of each in turn. The best fixed length is chosen in hindsight, load
    by load.
    """
    from tandem_serve.bench.policies import PoliciesOptions, run_policies
    from tandem_serve.bench.tables import ProgressBar, print_policies
    from tandem_serve.cli_errors import reported
    from tandem_serve.models.pairs import pair_folder

    with reported():
        options = PoliciesOptions(
            pair=pair_folder(pair),
            prompts=prompts,
            field=field,
            limit=limit,
            policies=_policy_names(names),
            batches=tuple(map(int, _numbers(batch, "--batch", low=1))),
            samples=tuple(map(int, _numbers(samples, "--samples", low=1))),
            temperatures=_numbers(temperature, "--temperature", low=0),
            max_tokens=max_tokens,
            steady=steady,
            inflate=inflate,
            num_threads=num_threads,
        )
        with ProgressBar("decoding") as bar:
            figures = run_policies(options, bar.expect)
    print_policies(figures)
    write_json(json_file, figures)


@app.command()
def standalone(
    pair: PairOption = "demo",
    prompts: PromptsOption = "heldout",
    field: FieldOption = "prompt",
    limit: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 24,
    block_lengths: Annotated[
        str, typer.Option(help="Drafts between two passes of the primary: 1..8, or 3.")
    ] = "1..6,8",
    models: Annotated[
        list[str], typer.Option("--model", help="NAME=FOLDER of a further model that writes alone; repeatable.")
    ] = [],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion.")] = 96,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy; else seeded by prompt.")] = 0.0,
    inflate: InflateOption = 1,
    data: Annotated[str, typer.Option(help="Text for accuracy: heldout, a file, a folder, JSONL.")] = "heldout",
    windows: Annotated[int, typer.Option(min=1, help="Batches of 8 x 256 tokens of it.")] = 8,
    num_threads: ThreadsOption = 1,
    json_file: JsonOption = None,
) -> None:
    """Standalone tandem, whose text nobody verifies, beside ML, MS without end, and models of your own.

    Speed by decoding in turn; quality as accuracy on held-out text, and as what ML makes of the texts written.
    """
    from tandem_serve.bench.eval_options import named_folders, parse_block_lengths
    from tandem_serve.bench.standalone import StandaloneOptions, run_standalone
    from tandem_serve.bench.tables import ProgressBar, print_standalone
    from tandem_serve.cli_errors import reported
    from tandem_serve.models.pairs import pair_folder

    with reported():
        options = StandaloneOptions(
            pair=pair_folder(pair),
            prompts=prompts,
            field=field,
            limit=limit,
            block_lengths=parse_block_lengths(block_lengths),
            models=named_folders(models),
            max_tokens=max_tokens,
            temperature=temperature,
            inflate=inflate,
            data=data,
            num_windows=windows,
            num_threads=num_threads,
        )
        with ProgressBar("writing") as bar:
            figures = run_standalone(options, bar.expect)
    print_standalone(figures)
    write_json(json_file, figures)


def _policy_names(text: str) -> tuple[str, ...]:
    """`fixed-1-3,optimal` as fixed-1, fixed-2, fixed-3, optimal."""
    found: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        bare = name.removeprefix("plain-drafter:")
        drafter = name.removesuffix(bare)
        kind, *lengths = bare.split("-")
        if kind == "fixed" and 1 <= len(lengths) <= 2 and all(x.isdigit() and 1 <= int(x) <= 32 for x in lengths):
            found += [f"{drafter}fixed-{length}" for length in range(int(lengths[0]), int(lengths[-1]) + 1)]
        elif bare in ("entropy", "router", "optimal"):
            found.append(name)
        else:
            raise typer.BadParameter(f"{name!r}: expected fixed-N, entropy, router or optimal", param_hint="--policies")
    return tuple(dict.fromkeys(found))


def _numbers(text: str, option: str, *, low: float) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < low:
        raise typer.BadParameter(f"{text!r}: expected numbers of at least {low:g}, e.g. 1,8", param_hint=option)
    return found


@app.command()
def steps(
    pair: PairOption = "demo",
    context: Annotated[int, typer.Option(min=1, help="Positions in the cache.")] = 256,
    count: Annotated[int, typer.Option(min=10, help="Steps of each.")] = 200,
    json_file: JsonOption = None,
) -> None:
    """One-token steps of the lean decoder against transformers', batch 1, one thread, same weights."""
    import torch

    from tandem_serve.bench.run_decode import provenance
    from tandem_serve.bench.steps import measure_steps
    from tandem_serve.bench.tables import print_steps
    from tandem_serve.cli_errors import reported
    from tandem_serve.models.pairs import pair_folder

    torch.set_num_threads(1)
    with reported():
        folder = pair_folder(pair)
        figures: dict[str, Any] = {
            "models": measure_steps(
                {"primary": folder / "primary", "drafter": folder / "plain-drafter"}, context, count
            ),
            "context": context,
            "provenance": provenance(),
        }
    print_steps(figures)
    write_json(json_file, figures)


@app.command()
def overhead(
    pair: PairOption = "demo",
    limit: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion.")] = 96,
    sample_ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of requests that is traced.")] = 0.01,
    scrape_interval_s: Annotated[float, typer.Option(min=0.1, help="How often the metrics are read.")] = 1.0,
    certificates: Annotated[
        Path | None, typer.Option(help="From scripts/make_certificates.py: TLS between the watched cluster's pools.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """What TLS, traces and metrics cost: two clusters of plain processes, one watched, prompt by prompt in turn."""
    from tandem_serve.bench.overhead import OverheadOptions, run_overhead
    from tandem_serve.bench.tables import ProgressBar, print_cluster
    from tandem_serve.cli_errors import reported
    from tandem_serve.models.pairs import pair_folder

    with reported():
        options = OverheadOptions(pair_folder(pair), limit, max_tokens, sample_ratio, scrape_interval_s, certificates)
        with ProgressBar("watched against unwatched") as bar:
            figures = run_overhead(options, bar.expect)
    print_cluster(figures, same_as="bare")
    cost = figures["cost"]
    typer.echo(f"cost: {cost['median']:.1%} of tokens/s (95 %: {cost['low']:.1%} to {cost['high']:.1%})")
    typer.echo(f"{figures['num_scrapes']} scrapes of each replica, {figures['num_exports']} exports of spans")
    write_json(json_file, figures)


@app.command()
def engines(
    pair: PairOption = "demo",
    prompts: PromptsOption = "heldout",
    field: FieldOption = "prompt",
    limit: Annotated[int, typer.Option(min=1, help="How many prompts, at each concurrency.")] = 16,
    modes: Annotated[str, typer.Option(help="Comma-separated; `all`, or see docs/vllm.md.")] = "vllm,vllm-tandem",
    concurrency: Annotated[str, typer.Option(help="Prompts at a time, comma-separated.")] = "1,4,16",
    block_length: Annotated[int, typer.Option(min=1, max=16, help="Drafts a round; vllm-tandem's first.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy; else seeded by prompt.")] = 0.0,
    inflate: InflateOption = 1,
    dtype: Dtype = Dtype.FLOAT32,
    draft_timeout_s: Annotated[float, typer.Option(min=0.001, help="Longest wait for drafts.")] = 0.5,
    json_file: JsonOption = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the table here as well.")] = None,
) -> None:
    """vLLM, our engines and their peers on one model and the same prompts, each in a process, in turn.

    A primary with a drafter elsewhere has one core and the drafter another; baselines have the primary's alone, and
    peers that draft by themselves have both. tokens/s counts from when all prompts of a wave have their first token.
    """
    from tandem_serve.bench.engines import MODES, EngineOptions, run_engines
    from tandem_serve.bench.tables import ProgressBar, print_engines
    from tandem_serve.cli_errors import reported
    from tandem_serve.models.pairs import pair_folder

    chosen = MODES if modes == "all" else tuple(name.strip() for name in modes.split(","))
    if unknown := sorted({*chosen} - {*MODES}):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(MODES)}", param_hint="--modes")
    if not all(part.strip().isdecimal() and int(part) for part in concurrency.split(",")):
        raise typer.BadParameter("expected numbers above 0, such as 1,4,16", param_hint="--concurrency")
    with reported():
        options = EngineOptions(
            pair=pair_folder(pair),
            prompts=prompts,
            field=field,
            limit=limit,
            modes=chosen,
            concurrency=tuple(int(part) for part in concurrency.split(",")),
            block_length=block_length,
            max_tokens=max_tokens,
            temperature=temperature,
            inflate=inflate,
            dtype=dtype.value,
            draft_timeout_s=draft_timeout_s,
        )
        with ProgressBar("waves") as bar:
            figures = run_engines(options, bar.expect)
    print_engines(figures, html_file)
    write_json(json_file, figures)
