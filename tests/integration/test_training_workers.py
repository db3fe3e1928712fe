"""Two workers with Ray Train go the way of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tandem_serve.models.checkpoint import load_drafter
from tandem_serve.training.run_folder import RunFolder
from tests.checkpoints import make_primary

pytestmark = pytest.mark.ray


def _train(out: Path, primary: Path, data: Path, *options: str) -> None:
    command = [
        sys.executable,
        "-m",
        "tandem_serve.cli",
        "train",
        "drafter",
        "--primary",
        str(primary),
        "--out",
        str(out),
    ]
    command += [
        "--data",
        str(data),
        "--both",
        "--tokens",
        str(21 * 4 * 32),
        "--sequence-length",
        "32",
        "--batch-size",
        "4",
    ]
    command += ["--hidden-size", "32", "--intermediate-size", "64", "--heads", "2", "--kv-heads", "1", "--threads", "1"]
    command += ["--sampled-tokens", "2k", "--precision", "fp32", "--quiet", *options]
    environment = {**os.environ, "HOME": str(out.parent), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_workers_have_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    primary = make_primary(tmp_path / "primary")
    data = tmp_path / "corpus.py"
    data.write_text("".join(f"def function_{i}(value):\n    return value + {i}\n\n" for i in range(400)))
    _train(tmp_path / "one", primary, data)
    _train(tmp_path / "two", primary, data, "--num-workers", "2", "--shard-primary")
    one, two = (RunFolder(tmp_path / name).read_log() for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 10, 20]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=0.01)
    assert one[-1]["losses"]["drafter"] < one[0]["losses"]["drafter"] - 0.5
    for name in ("drafter", "plain-drafter"):
        ours, theirs = (load_drafter(tmp_path / run / name).state_dict() for run in ("one", "two"))
        assert all(torch.allclose(ours[key], theirs[key], atol=0.05) for key in ours)
    origin = RunFolder(tmp_path / "two").read_provenance()
    assert origin["num_workers"] == 2 and "--num-workers 2" in origin["command"]
