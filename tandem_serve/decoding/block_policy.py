"""How many drafts a round gets: the primary plans each round, and the drafter may end a block early, token by token.

Neither ever changes a token of verified text, only the speed. The drafter's side is stopping_rules.py.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from tandem_serve.types import GenerationRequest, StoppingRule


class BlockPlan(NamedTuple):
    """What a round asks for: block_length drafts (vLLM: num_speculative_tokens), 0 for none, or fewer by `stopping`."""

    block_length: int
    stopping: StoppingRule | None = None


class StepSize(NamedTuple):
    """All that one step of the primary ran."""

    num_draft_steps: int  # drafts of the longest block: the others were most likely made along with it
    num_sequences: int
    num_tokens: int  # of all sequences
    has_prompts: bool  # some of them: then its time says nothing of decoding


class Round(NamedTuple):
    """How a sequence's round with drafts went, from one verification to the next."""

    num_drafts: int  # that came: fewer than planned where a stopping rule, or the text, ended the block
    num_accepted: int
    step: StepSize  # that verified it
    draft_s: float  # from asking to having them
    seconds: float  # all of the round


class BlockPolicy(Protocol):
    """Plans rounds. Called once a sequence and round: cheap.

    The engine itself caps the plan by what the drafter offers and by the tokens that the request may still have.
    """

    def plan(self, request: GenerationRequest, num_requests_running: int) -> BlockPlan:
        """The next round of a request, of which num_requests_running share the primary's next step, it included."""
        ...


class LearningPolicy(BlockPolicy, Protocol):
    """A BlockPolicy that is told how its rounds went. On the engine's thread."""

    def observe_step(self, size: StepSize, seconds: float) -> None:
        """The primary has run a step. After observe_round of the rounds that it verified."""
        ...

    def observe_round(self, request: GenerationRequest, outcome: Round) -> None:
        """A round of a request has been verified."""
        ...
