"""`tandem-serve keys`: API keys for a router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem_serve.cli_errors import reported

app = typer.Typer(help="API keys of a router.", no_args_is_help=True)


@app.callback()
def keys() -> None:
    """API keys of a router."""


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people to read.", show_default=False)],
    file: Annotated[
        Path | None, typer.Option(help="router.api_keys_file to add its line to. Default: print the line.")
    ] = None,
) -> None:
    """Make a key. It is shown this once; the file holds its hash. Removing the line takes the key back."""
    with reported():
        from tandem_serve.errors import ConfigError
        from tandem_serve.serving.api_keys import key_line, new_key

        key = new_key()
        line = key_line(name, key)
        if file is None:
            typer.echo(f"{line}", err=True)
        else:
            try:
                with file.open("a", encoding="utf-8") as handle:
                    handle.write(f"{line}\n")
            except OSError as error:
                raise ConfigError(f"{file}: {error.strerror}") from error
        typer.echo(key)
