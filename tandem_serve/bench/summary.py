"""From single runs to the figures of a benchmark. All ratios compare runs of the same prompts in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from statistics import median
from typing import Any

from tandem_serve.types import GenerationStep


@dataclass(frozen=True)
class PromptRun:
    """One prompt, completed once in one mode. The first step (the prompt's pass) counts as time to first token."""

    steps: tuple[GenerationStep, ...]
    first_token_s: float
    decode_s: float  # from the first token to the last
    draft_s: tuple[float, ...]  # one a block
    verify_s: tuple[float, ...]  # one a pass of the primary after the first

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for step in self.steps for token_id in step.token_ids)

    @property
    def tokens_per_s(self) -> float:
        return (len(self.token_ids) - len(self.steps[0].token_ids)) / self.decode_s if self.decode_s else 0.0


def summarize(runs: Sequence[PromptRun], plain: Sequence[PromptRun] | None) -> dict[str, Any]:
    """One mode's figures. tokens_per_s is all decoded tokens over all decoding time; p10 and p90 are over prompts."""
    rates = sorted(run.tokens_per_s for run in runs if run.decode_s)
    blocks = [step for run in runs for step in run.steps if step.num_draft_tokens]
    longest = max((step.num_draft_tokens for step in blocks), default=0)
    accepted = sum(step.num_accepted_tokens for step in blocks)
    same = None if plain is None else [a.token_ids == b.token_ids for a, b in zip(runs, plain, strict=True)]
    return {
        "tokens_per_s": _rate(runs),
        "tokens_per_s_p10": quantile(rates, 0.1),
        "tokens_per_s_p90": quantile(rates, 0.9),
        "mean_acceptance_length": 1 + accepted / len(blocks) if blocks else 1.0,
        "accepted_per_block": accepted / len(blocks) if blocks else 0.0,
        "accepted_per_position": [
            sum(step.num_accepted_tokens > i for step in blocks) / len(blocks) for i in range(longest)
        ],
        "num_drafts": len(blocks),
        "draft_ms": _median_ms([s for run in runs for s in run.draft_s]),
        "verify_ms": _median_ms([s for run in runs for s in run.verify_s]),
        "time_to_first_token_ms": _median_ms([run.first_token_s for run in runs]),
        "identical_to_plain": None if same is None else all(same),
        "identical_prompts": None if same is None else sum(same),
    }


_COMPARED = (
    ("tandem", "plain"),
    ("tandem", "plain-drafter"),
    ("plain-drafter", "plain"),
    ("tandem@grpc", "tandem"),
    ("observed", "bare"),
    ("control", "bare"),
)


def ratios(runs: Mapping[str, Sequence[PromptRun]]) -> dict[str, float]:
    """tokens/s of one mode over another's, all prompts together."""
    return {f"{over}/{under}": _rate(runs[over]) / _rate(runs[under]) for over, under in _compared(runs)}


def ratio_spread(runs: Mapping[str, Sequence[PromptRun]]) -> dict[str, dict[str, float]]:
    """The same ratios prompt by prompt: median, the tenths at either end, and where the true median lies (95 %)."""
    spread = {}
    for over, under in _compared(runs):
        pairs = zip(runs[over], runs[under], strict=True)
        each = sorted(a.tokens_per_s / b.tokens_per_s for a, b in pairs if a.decode_s and b.decode_s)
        spread[f"{over}/{under}"] = {
            "p10": quantile(each, 0.1),
            "p50": quantile(each, 0.5),
            "p90": quantile(each, 0.9),
            **dict(zip(("p50_low", "p50_high"), median_interval(each), strict=True)),
        }
    return spread


def _compared(runs: Mapping[str, Sequence[PromptRun]]) -> list[tuple[str, str]]:
    return [(over, under) for over, under in _COMPARED if over in runs and under in runs]


def _rate(runs: Sequence[PromptRun]) -> float:
    """Decoded tokens a second, first tokens left out."""
    seconds = sum(run.decode_s for run in runs)
    return sum(run.tokens_per_s * run.decode_s for run in runs) / seconds if seconds else 0.0


def _median_ms(seconds: Sequence[float]) -> float:
    return median(seconds) * 1e3 if seconds else 0.0


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Between which values of a sorted sample the median of what it was drawn from lies, 19 times in 20.

    By ranks (the sign test's normal approximation), so it supposes nothing about how the values are spread.
    """
    if not ordered:
        return 0.0, 0.0
    half, width = len(ordered) / 2, 0.98 * sqrt(len(ordered))
    return ordered[max(0, floor(half - width))], ordered[min(len(ordered) - 1, ceil(half + width) - 1)]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest value of a sorted sample; 0 for an empty one."""
    return ordered[round(share * (len(ordered) - 1))] if ordered else 0.0
