"""The dashboard is what its generator writes; alert rules load, fire where they should, and are explained."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "observability"
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]


def test_the_dashboard_is_current() -> None:
    command = [sys.executable, ROOT / "scripts" / "generate_dashboard.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


def test_every_alert_has_its_section_in_the_operator_s_document() -> None:
    headings = re.findall(r"^#+ (Tandem\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
    assert {rule["annotations"]["runbook"].split("#")[1] for rule in RULES} == {name.lower() for name in headings}


def test_every_alert_is_tested() -> None:
    tested = (FOLDER / "alerts_test.yaml").read_text()
    assert [rule["alert"] for rule in RULES if rule["alert"] not in tested] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus")
@pytest.mark.parametrize(
    "command", ["check rules alerts.yaml", "check config prometheus.yml", "test rules alerts_test.yaml"]
)
def test_promtool_agrees(command: str) -> None:
    run = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
