"""Objects of the Gateway API, cert-manager and the Prometheus operator against those projects' own types.

TypeScript's compiler finds fields that do not exist, missing ones and wrong types, kubernetes-models' validators
patterns and ranges. Both are generated from the projects' sources; scripts/fetch_kubernetes_types.sh gets them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = {  # by apiVersion
    "cert-manager.io/v1": "cert-manager",
    "gateway.networking.k8s.io/v1": "gateway-api",
    "monitoring.coreos.com/v1": "prometheus-operator",
}
_MODULES = Path(__file__).parents[1] / ".venv" / "kubernetes-types" / "node_modules"
_COMPILE = ("--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022", "--noEmitOnError")

ARE_INSTALLED = (_MODULES / ".bin" / "tsc").exists() and shutil.which("node") is not None


def complaints(objects: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """What compiler and validators say of `objects`, each with an apiVersion of PACKAGES; empty where all are valid.

    Args:
        folder: an empty one, to work in.
    """
    (folder / "node_modules").symlink_to(_MODULES.resolve())
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "objects.ts").write_text("".join(_checked(number, each) for number, each in enumerate(objects)))
    compiler = _run(folder, str(_MODULES / ".bin" / "tsc"), *_COMPILE, "objects.ts")
    return compiler or _run(folder, "node", "objects.js")


def _checked(number: int, described: Mapping[str, Any]) -> str:
    kind, version = described["kind"], described["apiVersion"]
    module = f"@kubernetes-models/{PACKAGES[version]}/{version}"
    return f"""\
import {{ {kind} as Kind{number}, type I{kind} as Type{number} }} from "{module}";
const object{number}: Type{number} = {json.dumps(described, indent=1)};
try {{ new Kind{number}(object{number}).validate(); }}
catch (error) {{ console.log("{kind}", (error as Error).message); }}
"""


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert said or done.returncode == 0, f"{command[0]} ended with {done.returncode} and said nothing"
    return said
