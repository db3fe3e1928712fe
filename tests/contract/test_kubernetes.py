"""What is in k8s/ against what cluster files say, and against the schemas of those who define its objects."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from tandem_serve.cli import app as command_line
from tandem_serve.config import load_cluster_config
from tandem_serve.errors import ConfigError
from tandem_serve.serving.kubernetes import TERMINATION_GRACE_PERIOD_S, ray_service
from tandem_serve.serving.pool_replicas import DRAIN_TIMEOUT_S
from tests import kubernetes_types

ROOT = Path(__file__).parents[2]
# KubeRay's CRDs are no part of this repository: a folder with ray.io_rayservices.yaml.
CRDS = Path(os.environ.get("TANDEM_KUBERAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay"))
KUBERNETES = "1.34"
MADE_FROM = {
    "base": "kubernetes",
    "overlays/dev-cpu": "kubernetes-dev",
    "overlays/gpu-static": "kubernetes-gpu",
    "overlays/gpu-autoscaled": "kubernetes-autoscaled",
    "overlays/incremental-upgrade": "kubernetes-incremental",
}
folders = pytest.mark.parametrize("folder", MADE_FROM)

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl (Debian: kubernetes-client)")
needs_types = pytest.mark.skipif(
    not kubernetes_types.ARE_INSTALLED, reason="no types of other projects' objects: scripts/fetch_kubernetes_types.sh"
)
needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"no CRDs of KubeRay: {CRDS}; TANDEM_KUBERAY_CRDS says where they are"
)


@cache
def render(name: str) -> str:
    result = CliRunner().invoke(command_line, ["k8s", "render", str(ROOT / "deployments" / f"{name}.yaml")])
    assert result.exit_code == 0, result.output
    return result.stdout


@cache
def kustomized(folder: str) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


def one(folder: str, kind: str) -> dict[str, Any]:
    (found,) = [document for document in kustomized(folder) if document["kind"] == kind]
    return found


def pods(folder: str) -> dict[str, dict[str, Any]]:
    """Pod templates by pool."""
    cluster = one(folder, "RayService")["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


# ------------------------------------------------------------------ from cluster files


@folders
def test_what_is_committed_is_what_render_prints(folder: str) -> None:
    assert (ROOT / "k8s" / folder / "rayservice.yaml").read_text() == render(MADE_FROM[folder])


def test_every_cluster_file_for_kubernetes_is_rendered_somewhere() -> None:
    assert {file.stem for file in (ROOT / "deployments").glob("kubernetes*.yaml")} == set(MADE_FROM.values())


@needs_kubectl
@folders
def test_an_overlay_deploys_the_rendered_service(folder: str) -> None:
    """As a patch it could leave something of the base behind."""
    rendered = yaml.safe_load(render(MADE_FROM[folder]))
    assert rendered["metadata"].pop("namespace", None) is None
    found = dict(one(folder, "RayService"))
    assert found["metadata"].pop("namespace") == "tandem"
    for template in pods(folder).values():
        template["metadata"].pop("creationTimestamp", None)
    assert found == rendered


@pytest.mark.parametrize("name", MADE_FROM.values())
def test_serve_takes_the_serve_config(name: str) -> None:
    """Its schema; tests/e2e deploys it."""
    config = yaml.safe_load(yaml.safe_load(render(name))["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    assert [application.name for application in schema.applications] == ["tandem-primary", "tandem-drafter", "tandem"]


def test_a_pool_must_ask_for_the_label_of_its_pods() -> None:
    config = load_cluster_config(ROOT / "deployments" / "demo.yaml")
    with pytest.raises(ConfigError, match=r"router\.resources\.label_selector must be \{pool: router\}"):
        ray_service(config, {}, {})


def test_a_path_must_mean_the_same_in_every_pod() -> None:
    config = load_cluster_config(ROOT / "deployments" / "kubernetes.yaml")
    pool = config.primary.model_copy(update={"tls_folder": "../certificates"})
    with pytest.raises(ConfigError, match=r"primary\.tls_folder: \.\./certificates"):
        ray_service(config.model_copy(update={"primary": pool}), {}, {})


def test_alert_rules_are_those_of_observability() -> None:
    rule = yaml.safe_load((ROOT / "k8s" / "base" / "alerts.yaml").read_text())
    assert rule["spec"] == yaml.safe_load((ROOT / "observability" / "alerts.yaml").read_text())


# ------------------------------------------------------------------ against schemas


@needs_kubectl
@folders
def test_kubernetes_own_objects_are_valid(folder: str) -> None:
    checked = 0
    for document in kustomized(folder):
        if document["apiVersion"] not in {*kubernetes_types.PACKAGES, "ray.io/v1"}:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            checked += 1
    for name, template in pods(folder).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    service = one(folder, "RayService")["spec"]["serveService"]
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Service", **service}, KUBERNETES, strict=True)
    assert checked >= 7


@cache
def ray_service_schema() -> jsonschema.Draft202012Validator:
    with (CRDS / "ray.io_rayservices.yaml").open("rb") as file:
        crd = yaml.load(file, Loader=yaml.CSafeLoader)
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    _refuse_unknown_fields(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return jsonschema.Draft202012Validator(schema)


def _refuse_unknown_fields(schema: Any) -> None:
    """The API server drops them without a word; a misspelt field would never be found."""
    if isinstance(schema, list):
        for each in schema:
            _refuse_unknown_fields(each)
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for each in schema.values():
            _refuse_unknown_fields(each)


@needs_kubectl
@needs_crds
@folders
def test_the_ray_service_is_valid(folder: str) -> None:
    errors = [
        f"{error.json_path}: {error.message}" for error in ray_service_schema().iter_errors(one(folder, "RayService"))
    ]
    assert errors == []


@needs_kubectl
@needs_crds
def test_the_schema_would_find_a_mistake() -> None:
    service = yaml.safe_load(yaml.safe_dump(one("base", "RayService")))
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["groupname"] = "x"
    assert "groupname" in next(ray_service_schema().iter_errors(service)).message


def of_other_projects(folder: str) -> list[dict[str, Any]]:
    return [document for document in kustomized(folder) if document["apiVersion"] in kubernetes_types.PACKAGES]


@needs_kubectl
@needs_types
@folders
def test_objects_of_other_projects_are_valid(folder: str, tmp_path: Path) -> None:
    found = of_other_projects(folder)
    assert (found == []) is (folder == "overlays/dev-cpu")
    assert kubernetes_types.complaints(found, tmp_path) == ""


@needs_kubectl
@needs_types
@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"gatewayClassName": 5}, "Type 'number' is not assignable to type 'string'"),
        ({"gatewayClass": "envoy"}, '"gatewayClass"\' does not exist in type'),
        ({"addresses": [{"type": "IP Address", "value": "x"}]}, "data/spec/addresses/0/type must match pattern"),
    ],
)
def test_the_types_would_find_a_mistake(wrong: dict[str, Any], found: str, tmp_path: Path) -> None:
    (gateway,) = [document for document in of_other_projects("base") if document["kind"] == "Gateway"]
    mistaken = {**gateway, "spec": {**gateway["spec"], **wrong}}
    assert found in kubernetes_types.complaints([mistaken], tmp_path)


# ------------------------------------------------------------------ that it fits together


@needs_kubectl
@folders
def test_pods_are_locked_down_and_have_time_to_drain(folder: str) -> None:
    for name, template in pods(folder).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["terminationGracePeriodSeconds"] > DRAIN_TIMEOUT_S + 5
        assert spec["automountServiceAccountToken"] is (name == "head")
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert TERMINATION_GRACE_PERIOD_S > DRAIN_TIMEOUT_S + 5


@needs_kubectl
@folders
def test_names_lead_to_something(folder: str) -> None:
    """Selectors to labels, routes to the service, mounts to secrets that cert-manager writes."""
    documents = kustomized(folder)
    labels = [template["metadata"]["labels"] for template in pods(folder).values()]
    selectors = [
        document["spec"].get("selector", document["spec"].get("podSelector"))["matchLabels"]
        for document in documents
        if document["kind"] in ("PodDisruptionBudget", "NetworkPolicy", "PodMonitor")
    ]
    for selector in selectors:
        assert any(selector.items() <= found.items() for found in labels), selector
    service = one(folder, "RayService")["spec"]["serveService"]
    offered = {(service["metadata"]["name"], port["port"]) for port in service["spec"]["ports"]}
    for document in documents:
        if document["kind"] in ("HTTPRoute", "GRPCRoute"):
            asked = {(ref["name"], ref["port"]) for rule in document["spec"]["rules"] for ref in rule["backendRefs"]}
            assert asked <= offered
    written = {document["spec"]["secretName"] for document in documents if document["kind"] == "Certificate"}
    secrets = {
        volume["secret"]["secretName"]
        for template in pods(folder).values()
        for volume in template["spec"]["volumes"]
        if "secret" in volume
    }
    assert secrets - {"tandem-api-keys"} <= written
    assert (secrets == set()) == (folder == "overlays/dev-cpu")
    account = one(folder, "ServiceAccount")["metadata"]["name"]
    assert {template["spec"]["serviceAccountName"] for template in pods(folder).values()} == {account}


@needs_kubectl
def test_gpus_and_scaling_are_where_they_were_asked_for() -> None:
    for folder in ("overlays/gpu-static", "overlays/gpu-autoscaled"):
        found = pods(folder)
        for name, template in found.items():
            wants = "nvidia.com/gpu" in template["spec"]["containers"][0]["resources"]["limits"]
            assert wants is (name in ("primary", "drafter"))
            assert ("tolerations" in template["spec"]) is wants
    static, elastic = (one(f"overlays/{name}", "RayService")["spec"] for name in ("gpu-static", "gpu-autoscaled"))
    assert "enableInTreeAutoscaling" not in static["rayClusterConfig"]
    assert elastic["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in elastic["rayClusterConfig"]["workerGroupSpecs"]}
    config = yaml.safe_load(elastic["serveConfigV2"])
    for application in config["applications"]:
        group = groups[application["args"]["pool"]["resources"]["label_selector"]["pool"]]
        (deployment,) = application["deployments"]
        scaling = deployment["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    assert groups["primary"]["minReplicas"] < groups["primary"]["maxReplicas"]


@needs_kubectl
def test_an_upgrade_in_steps_has_the_autoscaler_it_needs() -> None:
    assert "enableInTreeAutoscaling" not in one("base", "RayService")["spec"]["rayClusterConfig"]
    spec = one("overlays/incremental-upgrade", "RayService")["spec"]
    assert spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is True
