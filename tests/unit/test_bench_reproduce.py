"""Plans: variables, what is done already, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tandem_serve.bench.reproduce import Step, read_plan, run_plan
from tandem_serve.cli import app
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


def _training(folder: Path, tokens: str) -> str:
    corpus = folder / "corpus.txt"
    corpus.write_text("def function(value):\n    return value\n" * 400)
    train = f"train primary --data {corpus} --out {folder}/run --tokens {tokens} --vocab-size 300 --quiet --layers 1"
    return f"{train} --hidden-size 32 --intermediate-size 64 --heads 2 --kv-heads 1 --sequence-length 32"


def _plan_of(folder: Path, *steps: dict[str, str], **variables: str) -> Path:
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({"variables": variables, "steps": list(steps)}))
    return file


def test_a_step_that_was_done_with_other_settings_says_so(tmp_path: Path) -> None:
    step = {"name": "train", "run": _training(tmp_path, "{tokens}"), "makes": "{out}/run/model/config.json"}
    plan = _plan_of(tmp_path, step, tokens="1k")
    heard: list[str] = []
    for settings in ([], [], ["tokens=2k"]):
        run_plan(read_plan(plan, tmp_path, settings), tmp_path, heard.append)
    assert "--tokens 1k" in heard[0] and heard[1].endswith("train: done")
    assert "done, by another command: remove" in heard[2]


def test_a_step_that_lacks_something_is_passed_over(tmp_path: Path) -> None:
    plan = _plan_of(tmp_path, {"name": "a", "run": "{text}", "makes": "{out}/a", "needs": "text"}, text="")
    heard: list[str] = []
    run_plan(read_plan(plan, tmp_path, []), tmp_path, heard.append)
    assert heard == ["[1/1] a: passed over without --set text=..."]
    with pytest.raises(ConfigError, match="step a"):
        run_plan(read_plan(plan, tmp_path, ["text=x"]), tmp_path, heard.append)


def test_a_failing_step_is_named_and_the_report_is_of_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0, "tokens": 100, "losses": {"drafter": 5.0}}\n')
    plan = _plan_of(tmp_path, {"name": "fails", "run": "no-such-command", "makes": "{out}/missing"})
    result = CliRunner().invoke(app, ["reproduce", str(plan), "--out", str(tmp_path)])
    assert (result.exit_code, "step fails: exit status 2" in result.output) == (1, True), result.output
    assert (tmp_path / "report.html").is_file()


def test_every_command_of_the_papers_plan_exists() -> None:
    """Each step parses as its command's options, and is told to make what the plan waits for."""
    import typer

    group = typer.main.get_command(app)
    steps = read_plan(_PAPER, Path("out"), ["prose=some-text"])
    assert len({step.name for step in steps}) == len(steps) == len(yaml.safe_load(_PAPER.read_text())["steps"])
    for step in steps:
        command, arguments = group, list(step.arguments)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(step.name, list(arguments))  # raises where an option is unknown or of the wrong kind
        assert any(part and str(step.makes).startswith(part) for part in arguments), step.name


def test_a_killed_plan_takes_its_step_along(tmp_path: Path) -> None:
    """While the step trains nobody else may train in its folder; a lock that is free again says that it has ended."""
    train = _training(tmp_path, "50M")
    file = _plan_of(tmp_path, {"name": "train", "run": train, "makes": "{out}/run/model/config.json"})
    command = [sys.executable, "-m", "tandem_serve.cli"]
    plan = subprocess.Popen([*command, "reproduce", str(file), "--out", str(tmp_path)])
    log = tmp_path / "run" / "log.jsonl"
    eventually(log.is_file, "the step trains", timeout_s=60)
    second = subprocess.run([*command, *train.split()], capture_output=True, text=True, check=False)
    assert (second.returncode, "another training is at work" in second.stderr) == (1, True), second.stderr
    plan.terminate()
    assert plan.wait(30) != 0
    RunFolder(tmp_path / "run").lock()
