"""A cluster of three plain processes, for as long as a benchmark needs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem_serve.bench.processes import stop
from tandem_serve.errors import Unavailable

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
_ADDRESS = re.compile(r"(?:listening on (?:http://)?|grpc://|metrics on http://)([\w.]+:\d+)")


@dataclass(frozen=True, slots=True)
class Pools:
    """Where they listen."""

    http: str  # http://host:port
    metrics: tuple[str, ...]  # URLs; empty where they serve none


@contextmanager
def plain_pools(
    pair: Path, folder: Path, options: Callable[[str], Sequence[str]], *, with_metrics: bool
) -> Iterator[Pools]:
    """Drafter, primary and router of a pair, all on free ports of the loopback address; logs go to `folder`.

    Args:
        options: of the command line, by role.

    Raises:
        Unavailable: one does not come up; says where its log is.
    """
    metrics_port = ("--metrics-port", "0") if with_metrics else ()
    with ExitStack() as stack:

        def start(role: str, *arguments: str) -> list[str]:
            return stack.enter_context(_process(role, [*arguments, *options(role), *metrics_port], folder))

        drafter = start("drafter", "--model", str(pair / "drafter"))
        primary = start("primary", "--model", str(pair / "primary"), "--drafter", drafter[0])
        router = start(
            "router",
            *("--model", str(pair / "primary"), "--primary", primary[0]),
            *("--http-port", "0", "--grpc-port", "0"),
        )
        _wait_until_linked(f"http://{router[0]}/status")
        metrics = (drafter[1], primary[1], router[2]) if with_metrics else ()
        yield Pools(f"http://{router[0]}", tuple(f"http://{address}/metrics" for address in metrics))


@contextmanager
def _process(role: str, arguments: Sequence[str], folder: Path) -> Iterator[list[str]]:
    """One process, and the addresses that it announces."""
    file = folder / f"{role}.log"
    command = [sys.executable, "-m", "tandem_serve.cli", role, *arguments]
    with file.open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while f"{role} listening on" not in (text := file.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"the {role} did not come up: {text.strip().splitlines()[-1:]}, see {file}")
            time.sleep(0.05)
        yield _ADDRESS.findall(next(line for line in text.splitlines() if "listening on" in line))
    finally:
        stop(process, timeout_s=STOP_TIMEOUT_S)


def _wait_until_linked(status_url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(status_url, timeout=5) as answer:
                if b'"ready"' in answer.read():
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    raise Unavailable(f"{status_url}: no primary has a link to its drafter within {START_TIMEOUT_S:.0f} s")
