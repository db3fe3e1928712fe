"""How many drafts a primary asks for in a round. Set per request and from load; 0 means plain decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class BlockPolicy(Protocol):
    """Decides the next round's block length (vLLM: num_speculative_tokens). Called once a sequence and round: cheap.

    It never changes a token, only the speed. The engine itself caps the answer by what the drafter offers and by the
    tokens that the request may still have.
    """

    def block_length(self, requested: int | None, num_requests_running: int) -> int:
        """Drafts to ask for, 0 or more.

        Args:
            requested: GenerationRequest.block_length; None where the request leaves it to the engine.
            num_requests_running: sequences that share the primary's next step, this one included.
        """
        ...


@dataclass(frozen=True, slots=True)
class FixedBlockLength:
    """The request's own block length, else the same for everyone; load is ignored."""

    default: int = 5
    maximum: int = 16  # caps what requests ask for: a round verifies maximum + 1 tokens a sequence at most

    def __post_init__(self) -> None:
        if not 0 <= self.default <= self.maximum:
            raise ValueError(f"block length default {self.default} is not within 0..{self.maximum}")

    def block_length(self, requested: int | None, num_requests_running: int) -> int:
        """See BlockPolicy."""
        return min(self.default if requested is None else max(requested, 0), self.maximum)
