"""`tandem-serve bench`, `eval`, `report`, `reproduce`: what it costs and what it gains, as tables, JSON and a page."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, help="Measure: every claim a ratio within one run, on text nothing was trained on."
)


class Transport(StrEnum):
    LOCAL = "local"
    GRPC = "grpc"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


PairOption = Annotated[str, typer.Option(help="`demo`, or a folder that holds primary/, drafter/ and plain-drafter/.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")]


@app.command()
def decode(
    pair: PairOption = "demo",
    prompts: Annotated[
        str, typer.Option(help="A JSONL file, or `heldout`: what the pair was not trained on.")
    ] = "heldout",
    field: Annotated[str, typer.Option(help="Which key of a JSONL line is the prompt.")] = "prompt",
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
    inflate: Annotated[
        int, typer.Option(min=1, max=64, help="Make the primary so many times as deep, same outputs.")
    ] = 1,
    primary_dtype: Dtype = Dtype.FLOAT32,
    drafter_dtype: Dtype = Dtype.FLOAT32,
    num_threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
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
    _write(json_file, figures)


@app.command()
def policies(
    pair: PairOption = "demo",
    prompts: Annotated[
        str, typer.Option(help="A JSONL file, or `heldout`: what the pair was not trained on.")
    ] = "heldout",
    field: Annotated[str, typer.Option(help="Which key of a JSONL line is the prompt.")] = "prompt",
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
    inflate: Annotated[
        int, typer.Option(min=1, max=64, help="Make the primary so many times as deep, same outputs.")
    ] = 1,
    num_threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
    json_file: JsonOption = None,
) -> None:
    """Fixed block lengths against adaptive policies, each at its tokens/s over the best fixed length's.

    Every policy decodes the same requests, in turn. The best fixed length is chosen in hindsight, load by load.
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
            inflate=inflate,
            num_threads=num_threads,
        )
        with ProgressBar("decoding") as bar:
            figures = run_policies(options, bar.expect)
    print_policies(figures)
    _write(json_file, figures)


def _policy_names(text: str) -> tuple[str, ...]:
    """`fixed-1-3,optimal` as fixed-1, fixed-2, fixed-3, optimal."""
    found: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        drafter, bare = ("plain-drafter:", name[14:]) if name.startswith("plain-drafter:") else ("", name)
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
    _write(json_file, figures)


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
    typer.echo(f"{figures['num_scrapes']} scrapes of each replica, {figures['num_exports']} exports of spans")
    _write(json_file, figures)


@app.command()
def engines(
    pair: PairOption = "demo",
    prompts: Annotated[str, typer.Option(help="As for decode.")] = "heldout",
    field: Annotated[str, typer.Option(help="Which key of a JSONL line is the prompt.")] = "prompt",
    limit: Annotated[int, typer.Option(min=1, help="How many prompts, at each concurrency.")] = 16,
    modes: Annotated[str, typer.Option(help="Comma-separated; `all`, or see docs/vllm.md.")] = "vllm,vllm-tandem",
    concurrency: Annotated[str, typer.Option(help="Prompts at a time, comma-separated.")] = "1,4,16",
    block_length: Annotated[int, typer.Option(min=1, max=16, help="Drafts a round; vllm-tandem's first.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a completion.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy; else seeded by prompt.")] = 0.0,
    inflate: Annotated[int, typer.Option(min=1, max=64, help="As for decode.")] = 1,
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
    _write(json_file, figures)


def _write(file: Path | None, figures: dict[str, Any]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


# `tandem-serve eval`, `report` and `reproduce`


def evaluate(
    primary: Annotated[Path, typer.Option(help="Folder of the primary.")],
    drafters: Annotated[list[str], typer.Option("--drafter", help="NAME=FOLDER; repeatable.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text to measure on: `heldout` (what the primary's provenance names), stdlib, a file, a folder, JSONL."
        ),
    ] = "heldout",
    prompts: Annotated[
        str, typer.Option(help="JSONL file with prompts for the primary to continue; else they are cut from --data.")
    ] = "",
    field: Annotated[str, typer.Option(help="Which key of a JSONL line is the text.")] = "prompt",
    block_lengths: Annotated[str, typer.Option(help="A list and ranges of 1 to 32: 1..32, or 2,5,8.")] = "1..6,8",
    temperatures: Annotated[str, typer.Option(help="Of the primary's own texts: 0, or 0,0.8.")] = "0",
    couplings: Annotated[
        bool, typer.Option("--couplings", help="Shared noise against rejection sampling and block verification.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Batches of 8 x 256 tokens of text.")] = 16,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to continue.")] = 100,
    num_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each continuation.")] = 128,
    threads: Annotated[int, typer.Option(min=0, help="torch threads; 0 leaves torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Measure drafters on held-out text and on the primary's own texts: the paper's Table 1, acceptance by position,
    the passes that decoding would take."""
    import torch
    from rich.console import Console

    from tandem_serve.bench.eval_options import named_folders, parse_block_lengths, parse_temperatures
    from tandem_serve.bench.eval_table import print_eval
    from tandem_serve.cli_errors import reported
    from tandem_serve.training.evaluate_pair import EvaluationPlan, evaluate_pair

    with reported():
        plan = EvaluationPlan(
            data=data,
            field=field,
            prompts=prompts,
            block_lengths=parse_block_lengths(block_lengths),
            temperatures=parse_temperatures(temperatures),
            num_windows=windows,
            num_prompts=limit,
            num_tokens=num_tokens,
            couplings=couplings,
            device=device,
        )
        if threads:
            torch.set_num_threads(threads)
        with Console(stderr=True).status("loading") as status:
            figures = evaluate_pair(primary, named_folders(drafters), plan, status.update)
    print_eval(figures)
    _write(json_file, figures)


def report(
    folder: Annotated[Path, typer.Argument(help="What eval, bench decode and train wrote, at any depth.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: report.html in that folder.")] = None,
) -> None:
    """Write one self-contained HTML page: tables beside the paper's, and plots."""
    from tandem_serve.bench.report.page import write_report
    from tandem_serve.cli_errors import reported

    with reported():
        page = out or folder / "report.html"
        count = write_report(folder, page)
        typer.echo(f"{page}: {count} documents")


def reproduce(
    plan: Annotated[Path, typer.Argument(help="Steps as YAML: benchmarks/paper.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of runs, figures and the report.")],
    variables: Annotated[list[str], typer.Option("--set", help="NAME=VALUE of the plan; repeatable.")] = [],  # noqa: B006
    only: Annotated[str, typer.Option(help="Names of steps, with commas; default: all.")] = "",
) -> None:
    """Run the steps of a plan that are not done yet, then write the report. A killed run goes on where it stopped."""
    from tandem_serve.bench.reproduce import read_plan, run_plan
    from tandem_serve.cli_errors import reported

    with reported():
        steps = read_plan(plan, out, variables, tuple(name for name in only.split(",") if name))
        run_plan(steps, typer.echo)
        report(out)
