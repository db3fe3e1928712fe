"""`tandem-serve eval`, `report`, `reproduce`: drafters measured, and what was measured as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem_serve.cli_options import JsonOption, write_json


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
    write_json(json_file, figures)


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
    """Run the steps of a plan that are not done yet, then write the report: also where a step fails. A killed run goes
    on where it stopped.
    """
    from tandem_serve.bench.reproduce import read_plan, run_plan
    from tandem_serve.cli_errors import interruptible, reported

    with reported(), interruptible():  # or a killed plan would leave its step running
        steps = read_plan(plan, out, variables, tuple(name for name in only.split(",") if name))
        try:
            with reported():
                run_plan(steps, out, typer.echo)
        except typer.Exit:
            report(out)  # of what there is
            raise
        report(out)
