"""From a cluster file to Ray Serve applications, without starting Ray."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from tandem_serve.cli import app as command_line
from tandem_serve.config import ClusterConfig, VllmEngineConfig
from tandem_serve.errors import CheckpointError, ConfigError
from tandem_serve.serving import app
from tandem_serve.serving.cluster import check_models, load_cluster
from tandem_serve.serving.registry import ReplicaRegistry
from tests.checkpoints import make_drafter, make_primary

DEMO = Path(__file__).parents[2] / "deployments" / "demo.yaml"


def write(folder: Path, **changes: Any) -> Path:
    """A cluster file; `changes` by dotted path, with __ for the dot."""
    content: dict[str, Any] = {
        "name": "c",
        "primary": {"model": "primary", "engine": {"block_length": 3}},
        "drafter": {"model": "drafter", "resources": {"label_selector": {"pool": "drafter"}}},
        "router": {"model_name": "m"},
    }
    for path, value in changes.items():
        *parts, last = path.split("__")
        target = content
        for part in parts:
            target = target.setdefault(part, {})
        target[last] = value
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_drafter(folder / "drafter", make_primary(folder / "primary"))
    return folder


# ------------------------------------------------------------------ applications


def test_the_demo_file_makes_three_applications() -> None:
    config = load_cluster(DEMO)
    assert [(a.name, a.route_prefix) for a in app.applications(config)] == [
        ("tandem-demo-primary", None),
        ("tandem-demo-drafter", None),
        ("tandem-demo", "/"),
    ]


@pytest.mark.parametrize("file", sorted(DEMO.parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_deployment_file_builds(file: Path) -> None:
    config = load_cluster(file)
    built = ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_dump(app.serve_config(config))))
    assert [application.name for application in built.applications][-1] == config.name


def test_vllm_is_told_the_taps_of_the_drafter_pool(models: Path) -> None:
    engine = load_cluster(write(models, primary__engine={"engine": "vllm"})).primary.engine
    assert isinstance(engine, VllmEngineConfig)
    assert engine.taps == (0, 1, 2)
    given = load_cluster(write(models, primary__engine={"engine": "vllm", "taps": [1]})).primary.engine
    assert isinstance(given, VllmEngineConfig)
    assert given.taps == (1,)
    with pytest.raises(ConfigError, match="taps must be given"):
        load_cluster(write(models, primary__engine={"engine": "vllm"}, drafter__model="far/away"))
    with pytest.raises(ConfigError, match=r"primary\.engine\.block_length: "):
        load_cluster(write(models, primary__engine={"engine": "vllm", "block_length": 99}))


def test_the_serve_config_is_one_that_serve_takes(models: Path) -> None:
    config = load_cluster(write(models, drafter__num_replicas=2))
    schema = ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_dump(app.serve_config(config))))
    primary, drafter, router = schema.applications
    assert primary.import_path == "tandem_serve.serving.app:primary_app"
    scaling = drafter.deployments[0].autoscaling_config
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 2)
    assert primary.deployments[0].user_config == {"block_length": 3, "autoscaling": None}
    assert router.route_prefix == "/"
    assert schema.http_options.port == 8000
    # what the arguments say is what the builders are given
    args = app.RouterArgs.model_validate(router.args)
    assert (args.primary_application, args.drafter_application) == ("c-primary", "c-drafter")
    assert app.DrafterArgs.model_validate(drafter.args).pool.resources == config.drafter.resources


def test_deployments_can_be_placed_scaled_and_drained(models: Path) -> None:
    config = load_cluster(write(models))
    built = {a.name: a.builder(a.config()["args"])._bound_deployment for a in app.applications(config)}
    assert {name: deployment.name for name, deployment in built.items()} == {
        "c-primary": "Primary",
        "c-drafter": "Drafter",
        "c": "Router",
    }
    drafter = built["c-drafter"]
    assert drafter.ray_actor_options["label_selector"] == {"pool": "drafter"}
    for deployment in built.values():
        assert deployment._deployment_config.autoscaling_config is not None
        assert deployment._deployment_config.health_check_period_s == 2
        assert deployment._deployment_config.graceful_shutdown_timeout_s > app.DRAIN_TIMEOUT_S


def test_without_drafters_there_are_two_applications(models: Path) -> None:
    config = load_cluster(write(models, drafter__num_replicas=0))
    primary, router = app.applications(config)
    assert isinstance(primary.args, app.PrimaryArgs)
    assert isinstance(router.args, app.RouterArgs)
    assert primary.args.drafter_application is None
    assert router.args.drafter_application is None


# ------------------------------------------------------------------ cluster files


def test_models_are_found_beside_the_file_wherever_it_is_read_from(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(models)
    monkeypatch.chdir("/")
    assert load_cluster(file).primary.model == str(models / "primary")


def test_models_that_do_not_belong_together_are_found_out_before_anything_starts(models: Path, tmp_path: Path) -> None:
    check_models(load_cluster(write(models)))
    make_primary(tmp_path / "other", seed=9)
    with pytest.raises(ConfigError, match="fingerprint"):
        check_models(load_cluster(write(models, primary__model=str(tmp_path / "other"))))
    with pytest.raises(CheckpointError, match="nowhere"):
        check_models(load_cluster(write(models, primary__model="nowhere")))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(command_line, arguments)
    return result.exit_code, result.output


def test_build_prints_the_serve_config(models: Path) -> None:
    code, output = run("build", str(write(models)))
    assert code == 0
    assert yaml.safe_load(output) == app.serve_config(load_cluster(write(models)))
    assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(output))  # it is for people to read


def test_complete_shows_the_prompt_and_what_came_after_it(models: Path) -> None:
    code, output = run("complete", "a prompt", "--pair", str(models), "--max-tokens", "4")
    assert code == 0, output
    assert output.startswith("a prompt")
    assert "4 tokens, first after" in output


def test_complete_shows_nothing_but_the_error_where_nobody_answers() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        code, output = run("complete", "a prompt", "--url", address)
    assert code == 1
    assert "a prompt" not in output
    assert f"nobody answers at http://{address}" in output


def test_up_names_the_port_that_is_taken(models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = run("up", str(write(models, router__http_port=port)))
    assert code == 1
    assert f"router.http_port: port {port}" in output
    assert "is taken" in output


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"primary__engine__block_length": -1}, "primary.engine.block_length"),
        ({"router__colour": "red"}, "router.colour"),
        ({"drafter__model": 5}, "drafter.model"),
    ],
)
@pytest.mark.parametrize("command", ["up", "build"])
def test_a_wrong_file_is_an_error_that_names_the_field(
    models: Path, command: str, changes: dict[str, Any], named: str
) -> None:
    code, output = run(command, str(write(models, **changes)))
    assert code == 1
    assert named in output
    assert "Traceback" not in output


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    code, output = run("up", str(tmp_path / "nothing.yaml"))
    assert (code, "nothing.yaml" in output) == (1, True)


def test_engine_options_of_plain_processes_are_checked() -> None:
    code, output = run("drafter", "--model", "x", "--max-block-length", "99")
    assert code == 1
    assert "--max-block-length" in output


# ------------------------------------------------------------------ the registry


def test_watchers_hear_what_is_known_and_what_changes() -> None:
    registry, heard = ReplicaRegistry(), []
    registry.publish("a", {"r1": {"address": "h:1"}})
    registry.watch("a", lambda found: heard.append(sorted(found)))
    registry.publish("a", {"r1": {"address": "h:1"}})  # no news
    registry.publish("b", {"r9": {}})
    registry.publish("a", {"r1": {"address": "h:1"}, "r2": {}})
    registry.publish("a", {})
    assert heard == [["r1"], ["r1", "r2"], []]


def test_a_watcher_may_come_first() -> None:
    registry, heard = ReplicaRegistry(), []
    registry.watch("a", heard.append)
    assert heard == []
    registry.publish("a", {"r1": {}})
    assert heard == [{"r1": {}}]


def test_a_config_round_trips_through_the_arguments(models: Path) -> None:
    config = load_cluster(write(models))
    assert ClusterConfig.model_validate(config.model_dump(mode="json")) == config
