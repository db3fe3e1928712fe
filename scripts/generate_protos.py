"""Generates tandem_serve/rpc/_gen from protos/: `python scripts/generate_protos.py [--check]`.

protoc writes `from tandem.v1 import ...`, which would need a top-level package `tandem`; the import is rewritten to the
package that the files live in. `--check` writes nothing and fails where the committed files differ.
Needs grpcio-tools and mypy-protobuf (typed stubs) of the versions pinned in constraints.txt.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "tandem_serve" / "rpc" / "_gen"
PACKAGE = "tandem_serve.rpc._gen"


def generate() -> dict[Path, str]:
    """The generated files' text by path relative to GENERATED."""
    protos = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={folder}",
            f"--pyi_out={folder}",
            f"--grpc_python_out={folder}",
            f"--plugin=protoc-gen-mypy_grpc={plugin}",
            f"--mypy_grpc_out=quiet:{folder}",
            *protos,
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed")
        written = {path.relative_to(folder): path.read_text() for path in Path(folder).rglob("*.py*")}
    packages = {parent / "__init__.py": "" for path in written for parent in path.parents}
    # A file without a service still gets grpc stubs; nothing imports them.
    used = {path: _rewrite(text) for path, text in written.items() if "_grpc" not in path.name or "add_" in text}
    return {**packages, **used}


def _rewrite(text: str) -> str:
    text = re.sub(r"\bfrom tandem\b", f"from {PACKAGE}.tandem", text)
    text = re.sub(r"\bimport tandem\.v1\.(\w+)", rf"from {PACKAGE}.tandem.v1 import \1", text)
    # What a message says its module is: pickle looks there (Ray Serve's proxy hands messages to replicas pickled).
    text = re.sub(r"'tandem\.v1\.(\w+_pb2)'", rf"'{PACKAGE}.tandem.v1.\1'", text)
    return text


def main() -> None:
    expected = generate()
    actual = {
        path.relative_to(GENERATED): path.read_text() for path in GENERATED.rglob("*.py*") if path.suffix != ".pyc"
    }
    stale = sorted(str(path) for path in expected.keys() | actual.keys() if expected.get(path) != actual.get(path))
    if "--check" in sys.argv[1:]:
        if stale:
            raise SystemExit(f"not what protos/ gives (run `make protos`): {', '.join(stale)}")
        return
    for path in actual.keys() - expected.keys():
        (GENERATED / path).unlink()
    for path, text in expected.items():
        (GENERATED / path).parent.mkdir(parents=True, exist_ok=True)
        (GENERATED / path).write_text(text)


if __name__ == "__main__":
    main()
