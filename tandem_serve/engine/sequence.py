"""One request inside a primary engine: its tokens, its memory, and how its drafting stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem_serve.engine.drafter_links import DrafterPeer
from tandem_serve.engine.kv_cache import KvBuffer
from tandem_serve.engine.representation_log import RepresentationLog
from tandem_serve.errors import TandemError
from tandem_serve.metrics import WithoutDraft
from tandem_serve.tracing import TraceContext
from tandem_serve.types import DecodingMode, DrafterInfo, FinishReason, GenerationRequest, GenerationStep

# Receives a request's steps and, where it fails, one error as the last thing. On the engine's thread: must not block.
Sink = Callable[[GenerationStep | TandemError], None]


@dataclass(slots=True)
class Attachment:
    """One life of a sequence at one drafter. A block answers it only if incarnation and round are these."""

    drafter: DrafterPeer
    epoch: int  # of the link when it was opened; under another one the drafter knows nothing of it
    info: DrafterInfo  # of that epoch's drafter: there may be another one behind the link at any moment
    incarnation: int
    round: int = 0
    num_asked: int = 0  # drafts asked for in this round; 0: no round is under way
    asked_at_s: float = 0.0
    deadline_s: float = 0.0
    is_open: bool = False  # OpenSequence has been sent
    drafts: tuple[int, ...] | None = None  # the answer, once it is there
    draft_s: float = 0.0  # that it took


@dataclass(slots=True)
class Speculation:
    """A sequence's drafting, over all its drafters."""

    log: RepresentationLog
    named: DrafterPeer | None = None  # by the request; it may draft elsewhere
    attachment: Attachment | None = None
    cooldown_rounds: int = 0  # rounds to go before a drafter is asked again
    next_cooldown: int = 0  # how long the next cool-down will be
    num_rejections: int = 0  # since the last block
    draft_s: float | None = None  # that the block took that is verified now; None: none came in time


@dataclass(slots=True)
class SequenceTrace:
    """A traced request's spans: its own, and that of the round under way, which the drafter's are children of."""

    parent: TraceContext
    context: TraceContext
    round: TraceContext | None = None
    round_began_s: float = 0.0
    why_alone: str = ""  # of the latest round, where it had no drafts

    @classmethod
    def of(cls, traceparent: str | None) -> SequenceTrace | None:
        parent = TraceContext.parse(traceparent) if traceparent else None
        return None if parent is None else cls(parent, parent.child())

    def begin_round(self, now_s: float) -> TraceContext:
        """A drafter is asked; perhaps the second one, after the first was lost: the round is the same."""
        if self.round is None:
            self.round = self.context.child()
            self.round_began_s = now_s
        return self.round


@dataclass(slots=True, eq=False)
class Sequence:
    """A request from submission to its last token.

    token_ids are the prompt and everything chosen. num_computed positions have verified keys and values in `kv`; while
    decoding that is all but the last token, which opens the next round.
    """

    request: GenerationRequest
    sink: Sink
    arrived_at_s: float
    token_ids: list[int]
    num_due: int  # positions that the primary runs before anything else: the prompt, then blocks that stand unverified
    num_computed: int = 0
    num_unverified: int = 0  # drafts that are text already, of a block that is not yet full (standalone tandem)
    kv: KvBuffer | None = None  # from admission to the end
    reserved_tokens: int = 0
    first_token_at_s: float = 0.0
    last_token_at_s: float | None = None
    speculation: Speculation | None = None  # None: decodes plainly, and always will
    why_alone: WithoutDraft = WithoutDraft.NOT_REQUESTED  # why its next round has no drafts, unless it has
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    trace: SequenceTrace | None = None

    @classmethod
    def of(cls, request: GenerationRequest, sink: Sink, now_s: float) -> Sequence:
        stops, trace = frozenset(request.stop_token_ids), SequenceTrace.of(request.traceparent)
        sequence = cls(request, sink, now_s, list(request.prompt_token_ids), 0, stop_token_ids=stops, trace=trace)
        sequence.close_block()
        return sequence

    @property
    def deadline_s(self) -> float:
        """When its time is up, on the engine's clock."""
        return self.arrived_at_s + (math.inf if self.request.timeout_s is None else self.request.timeout_s)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens that it may still emit."""
        return self.request.max_tokens + self.num_prompt_tokens - len(self.token_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_due

    @property
    def is_standalone(self) -> bool:
        """Whether drafts are its text, unverified."""
        return self.request.mode.is_standalone and self.request.block_length != 0

    @property
    def primary_opens_blocks(self) -> bool:
        """Whether the primary, once it has run all that is due, writes the next token."""
        return not self.is_standalone or self.request.mode is not DecodingMode.TANDEM_REPRESENTATIONS

    def close_block(self) -> None:
        """Lets the primary run what has been written, but for the last token where the drafter opens with it."""
        self.num_due = len(self.token_ids) - (0 if self.primary_opens_blocks else 1)
        self.num_unverified = 0

    def extend(self, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """Adds chosen tokens up to the first that ends the sequence. Returns what was added, and why it ended."""
        for index, token_id in enumerate(token_ids):
            if token_id in self.stop_token_ids:
                self.token_ids += token_ids[: index + 1]
                return token_ids[: index + 1], FinishReason.STOP
        self.token_ids += token_ids
        return token_ids, FinishReason.LENGTH if self.num_remaining <= 0 else None
