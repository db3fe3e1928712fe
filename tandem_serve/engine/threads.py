"""What an engine's thread asks of the operating system."""

from __future__ import annotations

import contextlib
import os

_NICENESS = 5


def yield_to_io() -> None:
    """Lets other threads go first, from the calling one: those that carry tokens are due at once and soon done.

    Where an engine has cores of its own nothing changes. Where it shares them, as on a laptop, a router or a network
    thread need not wait for the end of the engine's time slice. (On Linux a niceness belongs to a thread.)
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, or a sandbox that forbids it
        os.nice(_NICENESS)  # more, so that who runs the process at some niceness keeps the distance
