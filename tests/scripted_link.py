"""A drafter played by a test: it answers rounds as its script says, and checks all that the primary tells it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tandem_serve.interfaces import LinkState
from tandem_serve.types import (
    CloseSequence,
    DraftBlock,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    ExtendSequence,
    OpenSequence,
    PrimaryInfo,
    SequenceRejected,
    credit_cost_bytes,
)


@dataclass
class Life:
    """What a drafter knows of one incarnation of a sequence."""

    opened: OpenSequence
    token_ids: list[int] = field(default_factory=list)
    representations: list[Tensor] = field(default_factory=list)
    rounds: list[ExtendSequence] = field(default_factory=list)  # those that ask for a block


Script = Callable[["ScriptedLink", Life, ExtendSequence], Sequence[DraftEvent]]


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class ScriptedLink:
    """Implements DrafterLink. `script` answers a round with the events that `receive` returns next.

    Asserts, as any real drafter would insist: nothing before its OpenSequence, incarnations that rise, positions
    without gaps or repeats, representations of the right shape, credit not overdrawn.
    """

    def __init__(self, info: DrafterInfo, script: Script, *, credit_bytes: int | None = None) -> None:
        self.address = "scripted"
        self.state = LinkState.READY
        self.epoch = 1
        self.info: DrafterInfo | None = info
        self.script = script
        self.wake: Callable[[], None] = lambda: None
        self.lives: dict[str, Life] = {}
        self.commands: list[DrafterCommand] = []
        self.closed: list[str] = []
        self.num_messages = 0
        self.events: deque[DraftEvent] = deque()
        self.is_closed = False
        self._credit_bytes = credit_bytes
        self._refund_bytes = 0
        self._incarnations: dict[str, int] = {}

    def __call__(self, address: str, primary: PrimaryInfo, wake: Callable[[], None]) -> ScriptedLink:
        """The link is its own factory."""
        self.address, self.wake = address, wake
        return self

    def credit_bytes(self) -> int:
        return 1 << 40 if self._credit_bytes is None else self._credit_bytes

    def send(self, commands: Sequence[DrafterCommand]) -> None:
        assert self.state is LinkState.READY
        assert commands
        self.num_messages += 1
        cost = sum(map(credit_cost_bytes, commands))
        assert cost <= self.credit_bytes()
        if self._credit_bytes is not None:
            self._credit_bytes -= cost
            self._refund_bytes += cost
        for command in commands:
            self.commands.append(command)
            self._take(command)

    def receive(self) -> list[DraftEvent]:
        if self._credit_bytes is not None:
            self._credit_bytes += self._refund_bytes
            self._refund_bytes = 0
        events = list(self.events)
        self.events.clear()
        return events

    def close(self) -> None:
        self.is_closed = True
        self.state = LinkState.CLOSED

    def reconnect(self) -> None:
        """The drafter has died and is back, knowing nothing. What it had said is still delivered: late."""
        self.epoch += 1
        self.lives.clear()

    def _take(self, command: DrafterCommand) -> None:
        if isinstance(command, OpenSequence):
            assert command.incarnation > self._incarnations.get(command.sequence_id, 0)
            self._incarnations[command.sequence_id] = command.incarnation
            self.lives[command.sequence_id] = Life(command)
            return
        life = self.lives.get(command.sequence_id)
        if life is None:  # lost with an earlier epoch, of which the primary has not heard yet
            assert self.epoch > 1 and command.incarnation == self._incarnations[command.sequence_id]
            self.events.append(SequenceRejected(command.sequence_id, command.incarnation, "unknown", True))
            return
        assert life.opened.incarnation == command.incarnation
        if isinstance(command, CloseSequence):
            self.closed.append(command.sequence_id)
            del self.lives[command.sequence_id]
            return
        assert command.start_position == len(life.token_ids)
        life.token_ids += command.token_ids
        self._take_representations(life, command)
        if command.next_token_id is not None:
            assert self.info is not None and 1 <= command.block_length <= self.info.max_block_length
            life.rounds.append(command)
            self.events.extend(self.script(self, life, command))

    def _take_representations(self, life: Life, command: ExtendSequence) -> None:
        assert self.info is not None
        shape = (len(command.token_ids), len(self.info.taps), self.info.primary_hidden_size)
        if command.representations is None:
            assert not self.info.taps or shape[0] == 0
        else:
            assert command.representations.shape == shape
            assert torch.isfinite(command.representations).all()
            life.representations.append(command.representations.clone())


def block(life: Life, command: ExtendSequence, draft_token_ids: Sequence[int]) -> DraftBlock:
    """The answer to a round."""
    return DraftBlock(life.opened.sequence_id, command.incarnation, command.round, tuple(draft_token_ids))


def oracle(texts: dict[str, Sequence[int]]) -> Script:
    """Drafts the right tokens: texts are whole sequences by id, prompt included."""

    def script(_: ScriptedLink, life: Life, command: ExtendSequence) -> list[DraftEvent]:
        first = len(life.token_ids) + (command.num_unverified or 0) + 1
        return [block(life, command, texts[life.opened.sequence_id][first : first + command.block_length])]

    return script


def silence(_: ScriptedLink, life: Life, command: ExtendSequence) -> list[DraftEvent]:
    """Never answers."""
    return []


def misbehaviour(kind: str, right: Script, vocab_size: int) -> Script:
    """One way to answer a round wrongly; `right` is how it would be right."""

    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> Sequence[DraftEvent]:
        answer = right(link, life, command)[0]
        assert isinstance(answer, DraftBlock)
        wrong = tuple((token_id + 1) % vocab_size for token_id in answer.draft_token_ids)
        name, life_number = answer.sequence_id, answer.incarnation
        answers: dict[str, Sequence[DraftEvent]] = {
            "right": [answer],
            "silent": [],
            "empty": [replace(answer, draft_token_ids=())],
            "wrong": [replace(answer, draft_token_ids=wrong)],
            "half wrong": [replace(answer, draft_token_ids=answer.draft_token_ids[:2] + wrong[2:])],
            "no such ids": [replace(answer, draft_token_ids=(*answer.draft_token_ids[:1], vocab_size, -1, 2**31))],
            "too many": [replace(answer, draft_token_ids=answer.draft_token_ids + wrong * 9)],
            "twice": [answer, replace(answer, draft_token_ids=wrong)],
            "stale round": [replace(answer, round=answer.round - 1, draft_token_ids=wrong), answer],
            "stale life": [replace(answer, incarnation=life_number - 1, draft_token_ids=wrong)],
            "unknown sequence": [replace(answer, sequence_id="nobody"), answer],
            "rejected, retryable": [SequenceRejected(name, life_number, "evicted", True)],
            "rejected": [SequenceRejected(name, life_number, "malformed", False)],
            "rejected, stale": [SequenceRejected(name, life_number - 1, "late", False), answer],
        }
        if kind == "dies":
            link.reconnect()
            return [answer]
        return answers[kind]

    return script


MISBEHAVIOURS = (
    "right",
    "silent",
    "empty",
    "wrong",
    "half wrong",
    "no such ids",
    "too many",
    "twice",
    "stale round",
    "stale life",
    "unknown sequence",
    "rejected, retryable",
    "rejected",
    "rejected, stale",
    "dies",
)
