"""The command line. Sub-commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import typer

from tandem_serve import (
    cli_bench,
    cli_cluster,
    cli_complete,
    cli_demo,
    cli_k8s,
    cli_keys,
    cli_report,
    cli_serve,
    cli_train,
    cli_trials,
)

app = typer.Typer(
    name="tandem-serve",
    help="Serve large language models with tandem speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("demo")(cli_demo.demo)
app.command("up")(cli_serve.up)
app.command("status")(cli_serve.status)
app.command("complete")(cli_complete.complete)
app.command("build")(cli_serve.build)
app.command("validate")(cli_cluster.validate)
app.command("schema")(cli_cluster.schema)
app.command("apply")(cli_cluster.apply)
app.command("primary", rich_help_panel="Plain processes, without Ray")(cli_serve.primary)
app.command("drafter", rich_help_panel="Plain processes, without Ray")(cli_serve.drafter)
app.command("router", rich_help_panel="Plain processes, without Ray")(cli_serve.router)
app.command("chaos")(cli_trials.chaos)
app.command("simulate")(cli_trials.simulate)
app.add_typer(cli_train.app, name="train")
app.command("eval")(cli_report.evaluate)
app.command("report")(cli_report.report)
app.command("reproduce")(cli_report.reproduce)
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_k8s.app, name="k8s")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
