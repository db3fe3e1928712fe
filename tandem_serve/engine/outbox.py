"""What one engine step has to say to drafters: one message a link, never more than the link's credit allows."""

from __future__ import annotations

from typing import NamedTuple

from tandem_serve.engine.drafter_links import DrafterPeer
from tandem_serve.interfaces import LinkState
from tandem_serve.types import CloseSequence, DrafterCommand, credit_cost_bytes

MAX_MESSAGE_BYTES = 16 << 20  # as credit_cost_bytes counts; what does not fit goes with the next step


class Message:
    """Commands for one drafter, and the credit left for more."""

    def __init__(self, drafter: DrafterPeer) -> None:
        self.drafter = drafter
        self.num_bytes_left = min(drafter.link.credit_bytes(), MAX_MESSAGE_BYTES)
        self.commands: list[DrafterCommand] = []

    def add(self, command: DrafterCommand) -> bool:
        """Appends a command where there is credit for it."""
        cost = credit_cost_bytes(command)
        if cost > self.num_bytes_left:
            return False
        self.num_bytes_left -= cost
        self.commands.append(command)
        return True


class _Closing(NamedTuple):
    """A CloseSequence on its way. Void under another epoch: the drafter has forgotten by itself."""

    drafter: DrafterPeer
    epoch: int
    command: CloseSequence


class Outbox:
    """Collects a step's commands; keeps CloseSequences until there is credit for them."""

    def __init__(self) -> None:
        self._messages: dict[DrafterPeer, Message] = {}
        self._closing: list[_Closing] = []

    def close_sequence(self, drafter: DrafterPeer, epoch: int, command: CloseSequence) -> None:
        self._closing.append(_Closing(drafter, epoch, command))

    def message_to(self, drafter: DrafterPeer) -> Message:
        """This step's message to a drafter that is ready."""
        message = self._messages.get(drafter)
        if message is None:
            message = self._messages[drafter] = Message(drafter)
        return message

    def add_closings(self) -> None:
        """Moves closings into the messages, as credit allows. They go first: they free the drafter's memory."""
        held_back = []
        for closing in self._closing:
            link = closing.drafter.link
            is_valid = link.state is LinkState.READY and link.epoch == closing.epoch
            if is_valid and not self.message_to(closing.drafter).add(closing.command):
                held_back.append(closing)
        self._closing = held_back

    def discard(self) -> None:
        """Forgets what this step has to say so far."""
        self._messages.clear()

    def flush(self) -> bool:
        """Hands the messages to their links. True where anything went out."""
        messages = [message for message in self._messages.values() if message.commands]
        self._messages.clear()
        for message in messages:
            message.drafter.link.send(message.commands)
        return bool(messages)
