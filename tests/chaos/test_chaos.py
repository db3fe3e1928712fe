"""`tandem-serve chaos` on a simulated cluster of five Ray nodes: every text as in a calm run, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving_contract import make_pair

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif("TANDEM_CHAOS" not in os.environ, reason="minutes of Ray on five nodes: TANDEM_CHAOS=1 runs it"),
]

NUM_FAULTS, SEED = 6, 37
FILE = """
name: chaotic
primary: {model: primary, num_replicas: 2, resources: {num_cpus: 0.5}, engine: {kv_cache_tokens: 16384}}
drafter: {model: drafter, num_replicas: 2, resources: {num_cpus: 0.5}}
router: {model_name: chaotic, num_replicas: 2, http_port: 0, grpc_port: 0}
"""


def test_faults_change_no_text_and_lose_none(tmp_path: Path) -> None:
    make_pair(tmp_path)
    (tmp_path / "cluster.yaml").write_text(FILE)
    report_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "tandem_serve.cli", "chaos", str(tmp_path / "cluster.yaml")]
    options = {"faults": NUM_FAULTS, "streams": 4, "seed": SEED, "max-tokens": 300, "json": report_file}
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_file.read_text())
    assert len({fault["kind"] for fault in report["faults"]}) == NUM_FAULTS
    assert all(fault["recovery_s"] is not None for fault in report["faults"])
    assert report["completed"] == report["accepted"] > NUM_FAULTS
    assert report["changed"] == report["never_accepted"] == 0
