"""Waiting on a DrafterLink without sleeping: the `wake` that it calls, as a condition."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tandem_serve.interfaces import DrafterLink, LinkState
from tandem_serve.types import DraftEvent


class Wake:
    """Counts wake-ups; wait_until() looks again after each."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 15.0) -> None:
        """Fails after timeout_s. Every change must call wake: nothing here polls."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not holds():
                seen = self.count
                arrived = self._changed.wait_for(lambda: self.count != seen, deadline - time.monotonic())  # noqa: B023
                assert arrived or holds(), "the link never got there"


def ready(link: DrafterLink, wake: Wake, epoch: int = 1) -> None:
    wake.wait_until(lambda: link.state is LinkState.READY and link.epoch >= epoch)


def events(link: DrafterLink, wake: Wake, count: int) -> list[DraftEvent]:
    """Waits for `count` events or more."""
    found: list[DraftEvent] = []

    def enough() -> bool:
        found.extend(link.receive())
        return len(found) >= count

    wake.wait_until(enough)
    return found
