"""Plans: variables, what is done already, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tandem_serve.bench.reproduce import Step, read_plan, run_plan
from tandem_serve.errors import ConfigError
from tandem_serve.training.run_folder import RunFolder
from tests.serving_contract import eventually

_PLAN = """
variables: {tokens: 5k}
steps:
  - {name: help, run: "--help {tokens}", makes: "{out}/help.txt"}
  - {name: train, run: "train primary --out {out}/a --tokens {tokens}", makes: "{out}/model"}
"""
_PAPER = Path(__file__).parents[2] / "benchmarks" / "paper.yaml"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(_PLAN)
    return file


def test_variables_are_filled_in(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "an out"
    (step,) = read_plan(plan, out, ["tokens=7k"], ["train"])
    assert step == Step("train", ("train", "primary", "--out", f"{out}/a", "--tokens", "7k"), out / "model")
    assert [step.name for step in read_plan(plan, out, [])] == ["help", "train"]


@pytest.mark.parametrize(("settings", "only"), [(["budget=1"], []), (["tokens"], []), ([], ["evaluate"])])
def test_unknown_variables_and_steps_are_refused(
    plan: Path, tmp_path: Path, settings: list[str], only: list[str]
) -> None:
    with pytest.raises(ConfigError):
        read_plan(plan, tmp_path, settings, only)


@pytest.mark.parametrize("text", ["steps: 3", "steps: [{name: a}]", "a: [", 'steps: [{name: a, run: "{b}", makes: c}]'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.yaml"):
        read_plan(file, tmp_path, [])


def test_a_step_that_is_done_is_not_run_and_a_failing_one_ends_the_plan(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    heard: list[str] = []
    done = Step("done", ("no-such-command",), tmp_path / "there")
    failing = Step("failing", ("no-such-command",), tmp_path / "missing")
    run_plan([done], tmp_path, heard.append)
    assert heard == ["[1/1] done: done"]
    with pytest.raises(ConfigError, match="step failing: exit status 2"):
        run_plan([failing, done], tmp_path, heard.append)
    assert len(heard) == 2


def test_a_step_that_was_done_with_other_settings_says_so(tmp_path: Path) -> None:
    """`schema` makes a file that a changed command would not make again."""
    made, heard = tmp_path / "made.json", []
    step = Step("schema", ("schema", "--help"), made)
    with pytest.raises(ConfigError, match="not made"):
        run_plan([step], tmp_path, heard.append)
    made.touch()
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "schema").write_text("schema --help")
    run_plan([step], tmp_path, heard.append)
    assert heard[-1].endswith("schema: done")
    run_plan([Step("schema", ("schema",), made)], tmp_path, heard.append)
    assert "by another command: remove" in heard[-1]


def test_every_command_of_the_papers_plan_exists() -> None:
    """Each step parses as its command's options, and is told to make what the plan waits for."""
    import typer

    from tandem_serve.cli import app

    group = typer.main.get_command(app)
    steps = read_plan(_PAPER, Path("out"), [])
    assert len({step.name for step in steps}) == len(steps) == len(yaml.safe_load(_PAPER.read_text())["steps"])
    for step in steps:
        command, arguments = group, list(step.arguments)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(step.name, list(arguments))  # raises where an option is unknown or of the wrong kind
        assert any(part and str(step.makes).startswith(part) for part in arguments), step.name


def test_a_killed_plan_takes_its_step_along(tmp_path: Path) -> None:
    """While the step trains nobody else may train in its folder; a lock that is free again says that it has ended."""
    (tmp_path / "corpus.txt").write_text("def function(value):\n    return value\n" * 400)
    train = f"train primary --data {tmp_path}/corpus.txt --out {tmp_path}/run --tokens 50M --vocab-size 300 --quiet"
    train += " --layers 1 --hidden-size 32 --intermediate-size 64 --heads 2 --kv-heads 1 --sequence-length 32"
    steps = [{"name": "train", "run": train, "makes": f"{tmp_path}/run/model/config.json"}]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"steps": steps}))
    command = [sys.executable, "-m", "tandem_serve.cli"]
    plan = subprocess.Popen([*command, "reproduce", str(tmp_path / "plan.yaml"), "--out", str(tmp_path)])
    log = tmp_path / "run" / "log.jsonl"
    eventually(log.is_file, "the step trains", timeout_s=60)
    second = subprocess.run([*command, *train.split()], capture_output=True, text=True, check=False)
    assert (second.returncode, "another training is at work" in second.stderr) == (1, True), second.stderr
    plan.terminate()
    assert plan.wait(30) != 0
    RunFolder(tmp_path / "run").lock()
