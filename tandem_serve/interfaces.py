"""The seams of the system as protocols. engine/ and rpc/ meet here and nowhere else; serving/ joins them.

client ─▶ router ─▶ Primary.generate ─▶ engine ─▶ DrafterLink ─▶ (gRPC or in process) ─▶ Drafter
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from enum import StrEnum
from typing import Protocol, runtime_checkable

from tandem_serve.types import (
    BlockLengths,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    DraftingCosts,
    GenerationRequest,
    GenerationStep,
    ModelCard,
    PrimaryInfo,
    PrimaryStatus,
    TextDelta,
    TextRequest,
)


class Primary(Protocol):
    """A primary replica as the router sees it: a Serve handle, a gRPC client, or the engine in this process."""

    async def info(self) -> PrimaryInfo: ...

    async def status(self) -> PrimaryStatus: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """Streams the sequence. Closing the iterator aborts the request in both pools.

        Raises InvalidRequest, Overloaded, Unavailable.
        """
        ...


@runtime_checkable
class Directable(Protocol):
    """A primary replica whose router decides how long its blocks are."""

    async def direct(self, lengths: BlockLengths | None) -> DraftingCosts | None:
        """Hands over what has been decided (None: nothing new) for what has been measured, and what it goes by then.

        None: this engine sees to its block lengths by itself. Raises Unavailable.
        """
        ...


class TextService(Protocol):
    """Text in, text out: what the public gRPC service and the HTTP endpoints stand on."""

    async def models(self) -> list[ModelCard]: ...

    def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """Streams all completions of a request, interleaved. Closing the iterator aborts them in both pools.

        Raises InvalidRequest, Overloaded, Unavailable.
        """
        ...


class LinkState(StrEnum):
    """Where a link stands.

    CONNECTING covers every retry. REFUSED: the models do not fit. Transports that reconnect ask again, but slowly: the
    address may get another drafter.
    """

    CONNECTING = "connecting"
    READY = "ready"
    REFUSED = "refused"
    CLOSED = "closed"


class DrafterLink(Protocol):
    """How a primary reaches one drafter. No method blocks; the transport reconnects by itself.

    A new `epoch` (they count up from 1) means a new connection: the drafter knows no sequence any more, whatever was
    sent is forgotten, and every sequence must be opened again. Whenever something changes (events, state, credit) the
    link calls the `wake` that its factory was given.
    """

    @property
    def address(self) -> str: ...

    @property
    def state(self) -> LinkState: ...

    @property
    def epoch(self) -> int: ...

    @property
    def info(self) -> DrafterInfo | None:
        """The drafter's handshake; None before the first READY."""
        ...

    def credit_bytes(self) -> int:
        """How much may be sent now (types.credit_cost_bytes). The primary keeps the rest to itself until it grows."""
        ...

    def send(self, commands: Sequence[DrafterCommand]) -> None:
        """Queues commands, in order, as one message. Dropped silently unless READY."""
        ...

    def receive(self) -> list[DraftEvent]:
        """Everything that has arrived since the last call. (CreditGranted is consumed by the link itself.)"""
        ...

    def close(self) -> None: ...


class LinkFactory(Protocol):
    """Opens a link to a drafter's address. Returns at once, in state CONNECTING or READY."""

    def __call__(self, address: str, primary: PrimaryInfo, wake: Callable[[], None]) -> DrafterLink: ...


class Drafter(Protocol):
    """A drafter engine as its transports see it. Thread-safe; nothing blocks on compute."""

    @property
    def info(self) -> DrafterInfo: ...

    def check_primary(self, primary: PrimaryInfo) -> None:
        """Raises ModelMismatch, naming what differs, where this drafter cannot draft for that primary."""
        ...

    def connect(self, peer_id: str, deliver: Callable[[list[DraftEvent]], None]) -> None:
        """Registers a primary's stream. `deliver` is called from the engine's thread and must not block."""
        ...

    def submit(self, peer_id: str, commands: Sequence[DrafterCommand]) -> None:
        """Hands over one message's commands. Malformed ones come back as SequenceRejected, never as exceptions."""
        ...

    def disconnect(self, peer_id: str) -> None:
        """Drops every sequence of that peer."""
        ...
