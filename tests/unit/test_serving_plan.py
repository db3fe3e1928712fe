"""What a changed cluster file will do, and the file's published schema. No Ray is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem_serve.config import ClusterConfig
from tandem_serve.serving import app
from tandem_serve.serving.plan import Change, Effect, plan

SCHEMA = Path(__file__).parents[2] / "deployments" / "schema.json"
FILE: dict[str, Any] = {
    "name": "c",
    "primary": {"model": "p", "num_replicas": 2},
    "drafter": {"model": "d"},
    "router": {"model_name": "m"},
}


def serve_config(**changes: Any) -> dict[str, Any]:
    """FILE's Serve config; `changes` by dotted path, with __ for the dot."""
    content = json.loads(json.dumps(FILE))
    for path, value in changes.items():
        *parts, last = path.split("__")
        target = content
        for part in parts:
            target = target.setdefault(part, {})
        target[last] = value
    return app.serve_config(ClusterConfig.model_validate(content))


def effects(**changes: Any) -> set[tuple[str, Effect]]:
    return {(change.application, change.effect) for change in plan(serve_config(), serve_config(**changes))}


@pytest.mark.parametrize(
    ("changes", "application"),
    [
        ({"primary__num_replicas": 3}, "c-primary"),
        ({"drafter__num_replicas": 5}, "c-drafter"),
        ({"router__num_replicas": 2}, "c"),
        ({"primary__engine__block_length": 2}, "c-primary"),
        ({"router__limits__max_n": 2}, "c"),
        ({"drafter__autoscaling": {"max_replicas": 8, "target_occupancy": 0.5}}, "c-drafter"),
        ({"primary__autoscaling": {"min_replicas": 2, "max_replicas": 4}}, "c-primary"),
        ({"router__max_surge_percent": 100}, "c"),
    ],
)
def test_what_a_running_pool_takes_touches_no_other_pool_and_restarts_nothing(
    changes: dict[str, Any], application: str
) -> None:
    assert effects(**changes) == {(application, Effect.IN_PLACE)}


@pytest.mark.parametrize(
    ("changes", "applications"),
    [
        ({"primary__engine__kv_cache_tokens": 128}, {"c-primary"}),
        ({"drafter__resources__num_gpus": 1}, {"c-drafter"}),
        ({"drafter__resources__label_selector": {"pool": "b"}}, {"c-drafter"}),
        ({"drafter__revision": "2"}, {"c-drafter"}),
        ({"primary__model": "q"}, {"c-primary", "c"}),  # the router has its tokenizer
    ],
)
def test_what_needs_a_restart_says_so(changes: dict[str, Any], applications: set[str]) -> None:
    assert effects(**changes) == {(application, Effect.RESTART) for application in applications}


def test_a_change_is_named_as_the_file_names_it() -> None:
    found = plan(serve_config(), serve_config(primary__engine__kv_cache_tokens=128))
    assert found == [Change("c-primary", "engine.kv_cache_tokens", 65_536, 128, Effect.RESTART)]


def test_ports_cannot_be_changed() -> None:
    assert effects(router__http_port=8001) == {("router", Effect.NEW_CLUSTER)}
    assert effects(router__http_port=0) == set()  # any will do


def test_drafters_can_be_taken_away_and_brought_back() -> None:
    without, having = serve_config(drafter__num_replicas=0), serve_config()
    assert {c.effect for c in plan(having, without) if c.application == "c-drafter"} == {Effect.STOP}
    assert {c.effect for c in plan(without, having) if c.application == "c-drafter"} == {Effect.START}
    restarted = {c.application for c in plan(having, without) if c.effect is Effect.RESTART}
    assert restarted == {"c-primary", "c"}  # they look for drafters no longer


def test_where_nothing_runs_everything_starts() -> None:
    found = plan({"applications": []}, serve_config())
    assert [(change.application, change.effect) for change in found] == [
        ("c", Effect.START),
        ("c-drafter", Effect.START),
        ("c-primary", Effect.START),
    ]


def test_the_published_schema_is_current() -> None:
    """If not: tandem-serve schema > deployments/schema.json"""
    assert json.loads(SCHEMA.read_text()) == ClusterConfig.model_json_schema()


@pytest.mark.parametrize(
    "pool",
    [
        {"autoscaling": {"min_replicas": 3, "max_replicas": 2}},
        {"autoscaling": {"max_replicas": 2}, "num_replicas": 0},
        {"autoscaling": {}},
    ],
)
def test_bounds_that_make_no_sense_are_refused(pool: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="replicas"):
        ClusterConfig.model_validate({**FILE, "drafter": {"model": "d", **pool}})
