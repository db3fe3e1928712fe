"""How commands fail: one red line that says what to do, exit status 1, no traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from tandem_serve.errors import TandemError


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns our own exceptions into a message and an exit status; bugs keep their traceback."""
    try:
        yield
    except TandemError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
