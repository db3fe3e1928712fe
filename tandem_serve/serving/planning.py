"""What a simulation needs and gives: measured costs, a trace, bounds of the pools, and a picture of the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tandem_serve.config import ClusterConfig, DrafterAutoscaling, PrimaryAutoscaling
from tandem_serve.errors import ConfigError


class Costs(BaseModel):
    """What engines take, measured; the defaults are the demo pair's on one core. Seconds, but for the last three."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step_fixed_s: float = Field(0.004, gt=0)  # a primary's step, whatever is in it
    step_token_s: float = Field(0.0008, ge=0)  # and each token that it verifies
    draft_fixed_s: float = Field(0.0004, ge=0)  # a drafter's step of one draft
    draft_sequence_s: float = Field(0.0001, ge=0)  # and each sequence in it
    round_trip_s: float = Field(0.0005, ge=0)
    prefill_token_s: float = Field(0.0006, ge=0)
    start_s: float = Field(20.0, ge=0)  # until a new replica serves
    block_length: int = Field(5, ge=0)
    accepted_drafts: float = Field(2.0, ge=0)  # of a block, in the mean

    def step_s(self, num_sequences: int) -> float:
        return self.step_fixed_s + self.step_token_s * num_sequences * (1 + self.block_length)

    def draft_s(self, num_sequences: float) -> float:
        """A block for each of a drafter's sequences; with fewer than one, for the one that is there now and then."""
        return self.block_length * (self.draft_fixed_s + self.draft_sequence_s * max(num_sequences, 1))


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[Arrival]:
    """A JSON object a line: {"at_s": 0.5, "prompt_tokens": 100, "output_tokens": 50}. Raises ConfigError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [Arrival(float(r["at_s"]), int(r["prompt_tokens"]), int(r["output_tokens"])) for r in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a trace: {error!r}") from error
    return sorted(found, key=lambda arrival: arrival.at_s)


def with_bounds(config: ClusterConfig, pools: str) -> ClusterConfig:
    """The cluster with other bounds: "primary=1:8,drafter=2:2". Raises ConfigError."""
    update: dict[str, Any] = {}
    for name, least, most in _parsed(pools):
        pool = getattr(config, name)
        kind = PrimaryAutoscaling if name == "primary" else DrafterAutoscaling
        known = {} if pool.autoscaling is None else pool.autoscaling.model_dump()
        update[name] = pool.model_copy(
            update={"autoscaling": kind(**{**known, "min_replicas": least, "max_replicas": most})}
        )
    return config.model_copy(update=update)


def _parsed(pools: str) -> Iterator[tuple[str, int, int]]:
    for part in pools.split(","):
        name, _, bounds = part.partition("=")
        least, _, most = bounds.partition(":")
        if name not in ("primary", "drafter") or not least.isdigit() or not (most or least).isdigit():
            raise ConfigError(f"--pools: {part!r} is not like primary=1:8 or drafter=2")
        yield name, int(least), int(most or least)


def plot(report: dict[str, Any], path: Path) -> None:
    """Requests and pool sizes over time. Raises ConfigError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'tandem-serve[train]'") from error
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    seconds = [point["at_s"] for point in report["series"]]
    for axes, names in ((above, ("running", "waiting")), (below, ("primaries", "drafters"))):
        for name in names:
            axes.step(seconds, [point[name] for point in report["series"]], where="post", label=name)
        axes.legend(loc="upper right")
        axes.set_ylim(bottom=0)
    below.set_xlabel("seconds")
    figure.savefig(path)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Those that a report gives; none of no values."""
    if not values:
        return {}
    ordered = sorted(values)
    return {f"p{share}": ordered[min(len(ordered) * share // 100, len(ordered) - 1)] for share in (50, 90, 99)}
