"""Ending the processes that a benchmark or a plan has started."""

from __future__ import annotations

import signal
import subprocess


def stop(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM, timeout_s: float = 20.0) -> None:
    """Asks it to end, with time to end what it has started itself; after timeout_s it is killed."""
    process.send_signal(number)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
