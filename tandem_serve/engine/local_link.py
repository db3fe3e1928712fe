"""A DrafterLink to a drafter engine in the same process: tests, single-process benchmarks, one-machine set-ups."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.errors import ModelMismatch
from tandem_serve.interfaces import LinkFactory, LinkState
from tandem_serve.types import (
    CreditGranted,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    PrimaryInfo,
    credit_cost_bytes,
)

_peer_numbers = itertools.count(1)


class LocalLink:
    """Connects at once (or is REFUSED) and never breaks; tensors are handed over as they are, not copied.

    `synchronous`: nobody runs the drafter; `receive` steps it on the caller's thread until it has nothing left to do.
    """

    def __init__(
        self,
        address: str,
        drafter: DrafterEngine,
        primary: PrimaryInfo,
        wake: Callable[[], None],
        *,
        synchronous: bool = False,
        credit_bytes: int = 64 << 20,
    ) -> None:
        self._address = address
        self._drafter = drafter
        self._wake = wake
        self._synchronous = synchronous
        self._credit_bytes = credit_bytes
        self._events: deque[DraftEvent] = deque()
        self._peer_id = f"local-{next(_peer_numbers)}"
        self._state = LinkState.READY
        try:
            drafter.check_primary(primary)
        except ModelMismatch:
            self._state = LinkState.REFUSED
        else:
            drafter.connect(self._peer_id, self._deliver)

    @property
    def address(self) -> str:
        return self._address

    @property
    def state(self) -> LinkState:
        return self._state

    @property
    def epoch(self) -> int:
        return 1

    @property
    def info(self) -> DrafterInfo | None:
        return self._drafter.info

    def credit_bytes(self) -> int:
        """See interfaces.DrafterLink."""
        return self._credit_bytes

    def send(self, commands: Sequence[DrafterCommand]) -> None:
        """See interfaces.DrafterLink."""
        if self._state is LinkState.READY:
            self._credit_bytes -= sum(map(credit_cost_bytes, commands))
            self._drafter.submit(self._peer_id, commands)

    def receive(self) -> list[DraftEvent]:
        """See interfaces.DrafterLink."""
        while self._synchronous and self._state is LinkState.READY and self._drafter.step():
            pass
        events: list[DraftEvent] = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, CreditGranted):
                self._credit_bytes += event.num_bytes
            else:
                events.append(event)
        return events

    def close(self) -> None:
        """See interfaces.DrafterLink."""
        if self._state is LinkState.READY:
            self._state = LinkState.CLOSED
            self._drafter.disconnect(self._peer_id)

    def _deliver(self, events: list[DraftEvent]) -> None:
        """On the drafter's thread."""
        self._events.extend(events)
        self._wake()


def local_link_factory(
    drafters: Mapping[str, DrafterEngine], *, synchronous: bool = False, credit_bytes: int = 64 << 20
) -> LinkFactory:
    """A LinkFactory over engines in this process, by address. Another address is a KeyError."""

    def connect(address: str, primary: PrimaryInfo, wake: Callable[[], None]) -> LocalLink:
        drafter = drafters[address]
        return LocalLink(address, drafter, primary, wake, synchronous=synchronous, credit_bytes=credit_bytes)

    return connect
