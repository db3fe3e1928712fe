"""A drafter in a process of its own, on a core of its own, for as long as a benchmark needs it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tandem_serve.bench.processes import stop


def pin_to_core(core: int) -> None:
    """Keeps this process on one core, where the platform can and there are several."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def drafter_process(model: Path, dtype: str, core: int) -> Iterator[str]:
    """Starts `tandem-serve drafter` and yields its address. It may not be ready yet: links retry."""
    address = f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "tandem_serve.cli", "drafter", "--model", str(model), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--num-threads", "1"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL)
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(process.pid, {core})
    try:
        yield address
    finally:
        stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
