"""The committed gRPC modules are what protos/ gives."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("grpc_tools") is None, reason="needs grpcio-tools")
def test_generating_again_gives_the_same_files() -> None:
    check = [sys.executable, str(ROOT / "scripts" / "generate_protos.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_package_named_tandem_is_needed() -> None:
    code = "import tandem_serve.rpc._gen.tandem.v1.inference_pb2_grpc, sys; assert 'tandem' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
