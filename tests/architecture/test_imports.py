"""The import floors hold, importing is cheap, and the public names are the ones that we mean to keep."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tandem_serve import errors

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "ray", "grpc", "google.protobuf", "vllm", "transformers", "fastapi"}

PUBLIC_NAMES = {
    "tandem_serve.errors": (
        "CheckpointError ConfigError DeadlineExceeded InvalidRequest ModelMismatch Overloaded PermissionDenied "
        "RequestAborted TandemError Unauthenticated Unavailable"
    ),
    "tandem_serve.decoding.block_policy": "BlockPlan BlockPolicy LearningPolicy Round StepSize",
    "tandem_serve.decoding.sampling": "Choice SamplingRows choose_token_ids filtered_scores gumbel_noise",
    "tandem_serve.decoding.stopping": "StopStrings",
    "tandem_serve.decoding.verify": "Verdict accept_prefix",
}


def _modules_after(statement: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter that has run one statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return set(run.stdout.split())


def test_import_contracts_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


def test_importing_the_package_is_cheap() -> None:
    added = _modules_after("import tandem_serve") - _modules_after("pass")
    assert not added & HEAVY
    assert len(added) < 150, sorted(added)  # importlib.metadata and what it needs, nothing else


@pytest.mark.parametrize(
    "module", ["types", "errors", "interfaces", "config", "decoding.stopping", "decoding.block_policy"]
)
def test_light_modules_stay_light(module: str) -> None:
    """A router process needs these and has no use for torch."""
    assert not _modules_after(f"import tandem_serve.{module}") & HEAVY


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names_are_pinned(module: str) -> None:
    members = vars(import_module(module)).items()
    own = {name for name, value in members if getattr(value, "__module__", None) == module and name[0] != "_"}
    assert own == set(PUBLIC_NAMES[module].split())


def test_the_drawn_exception_tree_is_the_real_one() -> None:
    """errors.py draws every exception, and each is a TandemError that says when it is raised."""
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    assert classes and all(issubclass(value, errors.TandemError) and value.__doc__ for value in classes)
    drawn = {word for word in (errors.__doc__ or "").split() if word in vars(errors)}
    assert drawn == {value.__name__ for value in classes}
