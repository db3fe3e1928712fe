"""A study as a list of this program's own commands: each is run once, in a process of its own."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tandem_serve.bench.processes import stop
from tandem_serve.errors import ConfigError


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    run: str  # a tandem-serve command as a shell would read it, without the program's name
    makes: str  # a file; where it exists the step is done
    needs: str = ""  # a variable: as long as it is empty, the step is passed over


class _Plan(BaseModel):
    model_config = ConfigDict(extra="forbid")

    variables: dict[str, str | int | float] = {}
    steps: list[_Step]


@dataclass(frozen=True)
class Step:
    """One command, and the file that it leaves when it is done."""

    name: str
    arguments: tuple[str, ...]
    makes: Path
    lacks: str = ""  # the variable that has to be set before it can run


def read_plan(file: Path, out: Path, settings: Sequence[str], only: Sequence[str] = ()) -> list[Step]:
    """The steps of a plan with its variables filled in; {out} is the folder of everything that is made.

    Args:
        settings: NAME=VALUE, each in the place of one of the plan's variables.
        only: names of steps; empty: all.

    Raises:
        ConfigError: naming what is wrong in the file or in the settings.
    """
    try:
        plan = _Plan.model_validate(yaml.safe_load(file.read_text("utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{file}: not a plan: {error}") from error
    values: dict[str, object] = dict(plan.variables)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in values:
            raise ConfigError(f"--set {setting!r}: expected NAME=VALUE of {', '.join(values) or 'no variables'}")
        values[name] = value
    if unknown := sorted({*only} - {step.name for step in plan.steps}):
        raise ConfigError(f"{file}: no step {', '.join(unknown)}")
    try:
        return [
            Step(
                step.name,
                tuple(shlex.split(step.run.format(out=shlex.quote(str(out)), **values))),
                Path(step.makes.format(out=out, **values)),
                step.needs if step.needs and not values[step.needs] else "",
            )
            for step in plan.steps
            if not only or step.name in only
        ]
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{file}: a step names {error}, which is no variable") from error


def run_plan(steps: Sequence[Step], out: Path, announce: Callable[[str], None]) -> None:
    """Runs what is not done, in order, and keeps each step's command beneath `out`: one that was done by another
    command, with other settings, is announced as such.

    Raises:
        ConfigError: where a command fails, or ends well without what it should make. Later steps are not run.
    """
    for number, step in enumerate(steps, 1):
        command, record = shlex.join(step.arguments), out / "steps" / step.name
        if step.lacks:
            announce(f"[{number}/{len(steps)}] {step.name}: passed over without --set {step.lacks}=...")
            continue
        if step.makes.exists():
            by_another = record.is_file() and record.read_text("utf-8") != command
            remedy = f", by another command: remove {step.makes} to run it again" if by_another else ""
            announce(f"[{number}/{len(steps)}] {step.name}: done{remedy}")
            continue
        announce(f"[{number}/{len(steps)}] {step.name}: tandem-serve {command}")
        status = _run([sys.executable, "-m", "tandem_serve.cli", *step.arguments])
        if status or not step.makes.exists():
            raise ConfigError(f"step {step.name}: exit status {status}, {step.makes} not made; mend it and run again")
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(command, encoding="utf-8")


def _run(command: Sequence[str]) -> int:
    """Its exit status. Whoever stops us stops the command, which has time to end what it has started."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        stop(process, signal.SIGINT)
        raise
