"""How commands fail: one red line that says what to do, exit status 1, no traceback. And how they are stopped."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

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


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM a KeyboardInterrupt, as Ctrl-C is one, also where the shell has told us to ignore Ctrl-C.

    Once: further SIGTERMs do not disturb the draining.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
