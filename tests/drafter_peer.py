"""A primary's end of a stream to a drafter engine, played by a test; and the drafts to expect, the slow way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem_serve.decoding.sampling import SamplingRows, choose_token_ids
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.models.decoder import Decoder, causal_attention
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.types import (
    CreditGranted,
    DraftBlock,
    DrafterCommand,
    DraftEvent,
    ExtendSequence,
    OpenSequence,
    SamplingParams,
)
from tests.checkpoints import CONFIG
from tests.dense_cache import DenseCache
from tests.engines import GREEDY, tiny_drafter, tiny_primary

TEXT = tuple(range(40, 120))
NUM_TAPS, WIDTH = CONFIG.num_layers, CONFIG.hidden_size


class Peer:
    """A primary's end of a stream, stepping the drafter by hand."""

    def __init__(self, engine: DrafterEngine, name: str = "p") -> None:
        self.engine, self.name = engine, name
        self.events: list[DraftEvent] = []
        self.num_deliveries = 0
        engine.connect(name, self._deliver)

    def _deliver(self, events: list[DraftEvent]) -> None:
        self.num_deliveries += 1
        self.events += events

    def say(self, *commands: DrafterCommand) -> None:
        self.engine.submit(self.name, commands)

    def ask(self, *commands: DrafterCommand) -> list[DraftEvent]:
        """Submits, steps, and returns what came back, credit aside."""
        self.say(*commands)
        self.engine.step()
        return self.take()

    def take(self) -> list[DraftEvent]:
        events = [event for event in self.events if not isinstance(event, CreditGranted)]
        self.events.clear()
        return events


@torch.inference_mode()
def representations(token_ids: Sequence[int]) -> Tensor:
    """The tiny primary's hidden states for the tandem drafter's taps, [n, num_taps, d]."""
    decoder = tiny_primary()[0]
    positions = torch.arange(len(token_ids))
    taps = tiny_drafter()[1].taps
    output = decoder(torch.tensor([list(token_ids)]), positions, causal_attention(CONFIG, len(token_ids)), taps)
    return torch.stack([tap[0] for tap in output.taps], 1)


def opening(name: str = "s", incarnation: int = 1, sampling: SamplingParams = GREEDY) -> OpenSequence:
    return OpenSequence(name, incarnation, sampling)


def extend(
    start: int = 0,
    end: int = 10,
    *,
    name: str = "s",
    incarnation: int = 1,
    round: int = 1,
    next_token_id: int | None = None,
    block_length: int = 4,
    tandem: bool = True,
    text: Sequence[int] = TEXT,
) -> ExtendSequence:
    """Positions start .. end - 1 of the text, and the one after them."""
    return ExtendSequence(
        sequence_id=name,
        incarnation=incarnation,
        round=round,
        start_position=start,
        token_ids=tuple(text[start:end]),
        representations=representations(text[:end])[start:] if tandem and end > start else None,
        next_token_id=text[end] if next_token_id is None else next_token_id,
        block_length=block_length,
    )


def quiet(command: ExtendSequence) -> ExtendSequence:
    """The same without asking for a block: a prompt chunk."""
    return replace(command, next_token_id=None, block_length=0)


def expected_drafts(num_verified: int, block_length: int, sampling: SamplingParams, kind: str) -> tuple[int, ...]:
    """The drafts behind TEXT[:num_verified] and the token that follows them there."""
    return drafts_behind(TEXT[: num_verified + 1], block_length, sampling, kind)


@torch.inference_mode()
def drafts_behind(
    text: Sequence[int], block_length: int, sampling: SamplingParams, kind: str = "tandem"
) -> tuple[int, ...]:
    """What MS drafts behind text, whose last token opens the block: token by token with the plainest cache."""
    num_verified = len(text) - 1
    model, _ = tiny_drafter(kind)
    decoder = model.decoder if isinstance(model, TandemDrafter) else model
    assert isinstance(decoder, Decoder)
    cache = DenseCache(decoder.config, 200)
    known = torch.arange(num_verified)
    if isinstance(model, TandemDrafter):
        if num_verified:
            cache.write(known, model.project(representations(text[:-1]), known))
    elif num_verified:
        decoder(torch.tensor(text[:-1]), known, cache.attend(known))
    drafts: list[int] = []
    for i in range(block_length):
        position = torch.tensor([num_verified + i])
        token_id = torch.tensor([drafts[-1] if drafts else text[-1]])
        logits = decoder.logits(decoder(token_id, position, cache.attend(position)).hidden)
        drafts.append(
            int(choose_token_ids(logits, SamplingRows.from_params([(sampling, num_verified + i + 1)])).token_ids)
        )
    return tuple(drafts)


def drafts_of(events: list[DraftEvent]) -> dict[tuple[str, int], tuple[int, ...]]:
    assert all(isinstance(event, DraftBlock) for event in events), events
    return {(e.sequence_id, e.round): e.draft_token_ids for e in events if isinstance(e, DraftBlock)}
