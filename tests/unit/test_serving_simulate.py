"""The simulator: exact where the answer is known, and pools that follow the load of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tandem_serve.cli import app
from tandem_serve.config import ClusterConfig
from tandem_serve.errors import ConfigError
from tandem_serve.serving.planning import Arrival, Costs, read_trace, with_bounds
from tandem_serve.serving.simulate import simulate

COSTS = Costs(
    step_fixed_s=0.01, step_token_s=0.001, draft_fixed_s=0.001, draft_sequence_s=0.0, round_trip_s=0.002,
    prefill_token_s=0.001, start_s=5.0, block_length=3, accepted_drafts=1.0,
)  # fmt: skip


def cluster(primary: Any = None, drafter: Any = None, **engine: int) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "primary": {"model": "p", "engine": engine, "autoscaling": primary},
            "drafter": {"model": "d", "autoscaling": drafter},
            "router": {"model_name": "m"},
        }
    )


def test_a_request_alone_takes_what_its_parts_take() -> None:
    report = simulate(cluster(), COSTS, [Arrival(0.0, 100, 40)])
    round_s = (0.01 + 4 * 0.001) + 3 * 0.001 + 0.002
    assert report["first_token_s"]["p50"] == pytest.approx(0.1)
    assert report["seconds_per_token"]["p50"] == pytest.approx((0.1 + 20 * round_s) / 40)
    assert (report["completed"], report["refused"]) == (1, 0)


def test_two_share_a_primary_and_a_third_waits_for_a_seat() -> None:
    trace = [Arrival(0.0, 0, 100), Arrival(0.0, 0, 100), Arrival(0.0, 0, 100)]
    report = simulate(cluster(max_num_seqs=2), COSTS, trace)
    both = 50 * ((0.01 + 8 * 0.001) + 3 * 0.001 + 0.002)
    assert max(report["first_token_s"].values()) == pytest.approx(both)
    assert report["completed"] == 3


def test_what_does_not_fit_the_queue_is_refused() -> None:
    report = simulate(cluster(max_num_seqs=1, max_num_waiting=2), COSTS, [Arrival(0.0, 1, 100)] * 9)
    assert (report["completed"], report["refused"]) == (3, 6)


def step_load(per_second: int) -> list[Arrival]:
    """A trickle all the time, and for a minute so many a second."""
    step = [Arrival(second + part / per_second, 50, 200) for second in range(20, 80) for part in range(per_second)]
    return sorted([*step, *(Arrival(float(second), 50, 20) for second in range(0, 200, 5))], key=lambda a: a.at_s)


STEP = step_load(20)
PACE = {"max_replicas": 6, "upscale_delay_s": 2, "downscale_delay_s": 10}


def sizes(report: dict[str, Any], plural: str) -> tuple[float, float, float]:
    """At the start, at most, at the end."""
    found = [point[plural] for point in report["series"]]
    return found[0], max(found), found[-1]


def test_pools_grow_and_shrink_by_their_own_need() -> None:
    easy = {**PACE, "target_occupancy": 1.0}
    report = simulate(cluster({**PACE, "target_occupancy": 0.5}, easy, max_num_seqs=8), COSTS, STEP)
    assert sizes(report, "primaries") == (1, 6, 1)
    assert sizes(report, "drafters") == (1, 1, 1)
    slow = COSTS.model_copy(update={"draft_sequence_s": 0.02})
    thin = step_load(1)
    roomy = {"max_num_seqs": 256, "kv_cache_tokens": 1 << 20, "primary": {**PACE, "target_occupancy": 1.0}}
    report = simulate(cluster(drafter={**PACE, "target_occupancy": 0.5}, **roomy), slow, thin)  # type: ignore[arg-type]
    assert sizes(report, "primaries") == (1, 1, 1)
    assert sizes(report, "drafters") == (1, 6, 1)
    assert report["completed"] == len(thin)


def test_a_pool_that_shrinks_loses_no_request() -> None:
    trace = [Arrival(0.0, 10, 400)] * 60 + [Arrival(300.0, 10, 10)]
    report = simulate(cluster({**PACE, "downscale_delay_s": 0, "target_waiting_tokens": 50}), COSTS, trace)
    assert sizes(report, "primaries")[1] > 1
    assert report["completed"] == len(trace)


def test_the_same_trace_gives_the_same_report() -> None:
    config = with_bounds(cluster(), "primary=1:8,drafter=2")
    assert config.primary.autoscaling is not None
    assert config.drafter.autoscaling is not None
    assert (config.primary.autoscaling.max_replicas, config.drafter.autoscaling.min_replicas) == (8, 2)
    assert simulate(config, COSTS, STEP) == simulate(config, COSTS, STEP)
    with pytest.raises(ConfigError, match="router=1"):
        with_bounds(config, "router=1")


def test_the_command_reads_a_trace_and_writes_a_report(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(
        "\n".join(json.dumps({"at_s": i, "prompt_tokens": 5, "output_tokens": 9}) for i in (1, 0))
    )
    assert [arrival.at_s for arrival in read_trace(tmp_path / "trace")] == [0.0, 1.0]
    (tmp_path / "c.yaml").write_text("{primary: {model: p}, drafter: {model: d}, router: {model_name: m}}")
    command = [
        "simulate",
        str(tmp_path / "c.yaml"),
        "--trace",
        str(tmp_path / "trace"),
        "--json",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out").read_text())["completed"] == 2
    (tmp_path / "trace").write_text("{}")
    assert CliRunner().invoke(app, command).exit_code == 1
