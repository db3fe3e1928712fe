"""A cluster file as a RayService of KubeRay 1.7: what `tandem-serve k8s render` prints.

One Ray worker group a pool, told apart by the Ray label `pool`, which the pools' label_selector asks for; a pod holds
one replica. Everything around it (services, routes, policies, certificates) is plain YAML in k8s/.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any

import yaml

from tandem_serve.config import ClusterConfig, DrafterPool, PrimaryPool, RouterPool
from tandem_serve.config_kubernetes import PodConfig
from tandem_serve.errors import ConfigError

RAY_VERSION = "2.60.0"
USER_ID = 10001  # of the image's user (docker/)
PART_OF = {"app.kubernetes.io/part-of": "tandem-serve"}
# Longer than a replica may take to drain (pool_replicas.DRAIN_TIMEOUT_S and 5 s), with room for Ray's own goodbye.
TERMINATION_GRACE_PERIOD_S = 60
_HOME = "/home/tandem"
_LABEL = "pool"

_Pool = PrimaryPool | DrafterPool | RouterPool


def ray_service(config: ClusterConfig, serve_config: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """The RayService.

    Args:
        config: the cluster, with models and files as paths inside the pods.
        serve_config: what app.serve_config made of it.
        environment: of every Ray process.

    Raises:
        ConfigError: a pool does not ask for the label of its group, or mounts cannot be made of its paths.
    """
    pools: dict[str, _Pool] = {"router": config.router, "primary": config.primary}
    if config.drafter.num_replicas:
        pools["drafter"] = config.drafter
    cluster: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},  # else whoever reaches a Ray port runs code
        "headGroupSpec": {
            # Nothing of ours runs on the head: Serve's controller does, and its loss is not ours.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(config, "head", None, environment),
        },
        "workerGroupSpecs": [_group(config, name, pool, environment) for name, pool in pools.items()],
    }
    is_elastic = any(_scale(pool)[0] != _scale(pool)[1] for pool in pools.values())
    if is_elastic or config.kubernetes.gateway_class is not None:  # steps of an upgrade are steps of the autoscaler
        cluster["enableInTreeAutoscaling"] = True
        cluster["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": 120, "upscalingMode": "Default"}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": config.name, "labels": dict(PART_OF)},
        "spec": {
            "upgradeStrategy": _upgrade(config.kubernetes.gateway_class),
            "rayClusterDeletionDelaySeconds": TERMINATION_GRACE_PERIOD_S,  # streams of the old cluster end meanwhile
            "excludeHeadPodFromServeSvc": True,
            "serveService": _service(config),
            "serveConfigV2": yaml.safe_dump(serve_config, sort_keys=False),
            "rayClusterConfig": cluster,
        },
    }


def _upgrade(gateway_class: str | None) -> dict[str, Any]:
    if gateway_class is None:
        return {"type": "NewCluster"}
    options = {
        "gatewayClassName": gateway_class,
        "stepSizePercent": 10,
        "intervalSeconds": 30,
        "maxSurgePercent": 20,
    }
    return {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}


def _service(config: ClusterConfig) -> dict[str, Any]:
    """Leads to Serve's proxies, of which every pod with a replica has one."""
    ports = [
        {"name": "http", "port": config.router.http_port, "targetPort": config.router.http_port},
        {
            "name": "grpc",
            "port": config.router.grpc_port,
            "targetPort": config.router.grpc_port,
            "appProtocol": "kubernetes.io/h2c",
        },
    ]
    return {"metadata": {"name": config.name, "labels": dict(PART_OF)}, "spec": {"ports": ports}}


def _group(config: ClusterConfig, name: str, pool: _Pool, environment: dict[str, str]) -> dict[str, Any]:
    if pool.resources.label_selector != {_LABEL: name}:
        raise ConfigError(f"{name}.resources.label_selector must be {{{_LABEL}: {name}}}: that is what the pods bear")
    smallest, largest = _scale(pool)
    return {
        "groupName": name,
        "replicas": smallest,
        "minReplicas": smallest,
        "maxReplicas": largest,
        "labels": {_LABEL: name},
        "rayStartParams": {"num-cpus": str(math.ceil(pool.resources.num_cpus))},
        "template": _pod(config, name, pool, environment),
    }


def _scale(pool: _Pool) -> tuple[int, int]:
    """How few and how many pods."""
    scaling = getattr(pool, "autoscaling", None)
    return (scaling.min_replicas, scaling.max_replicas) if scaling else (pool.num_replicas, pool.num_replicas)


def _pod(config: ClusterConfig, name: str, pool: _Pool | None, environment: dict[str, str]) -> dict[str, Any]:
    settings: PodConfig = getattr(config.kubernetes, name)
    volumes, mounts = _volumes(config, name, pool)
    container: dict[str, Any] = {
        "name": f"ray-{'head' if pool is None else 'worker'}",
        "image": settings.image or config.kubernetes.image,
        "imagePullPolicy": config.kubernetes.image_pull_policy,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "ports": _ports(config, pool),
        "resources": _resources(settings, pool),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": mounts,
    }
    spec: dict[str, Any] = {
        "serviceAccountName": "tandem",
        "automountServiceAccountToken": pool is None,  # for the head's autoscaler
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": TERMINATION_GRACE_PERIOD_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        spec["tolerations"] = [dict(each) for each in settings.tolerations]
    labels = {**PART_OF, "app.kubernetes.io/component": name}
    return {"metadata": {"labels": labels}, "spec": spec}


def _ports(config: ClusterConfig, pool: _Pool | None) -> list[dict[str, Any]]:
    """Of Serve's proxy, and Ray's own metrics; the head also has what KubeRay looks for."""
    ports = {"ray-metrics": 8080}
    if pool is None:
        ports |= {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    else:
        ports |= {"http": config.router.http_port, "grpc": config.router.grpc_port}
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _resources(settings: PodConfig, pool: _Pool | None) -> dict[str, dict[str, str]]:
    """Requests equal limits: Kubernetes then takes such a pod's memory last."""
    wanted = {"cpu": settings.cpu, "memory": settings.memory, "ephemeral-storage": settings.ephemeral_storage}
    if pool is not None and pool.resources.num_gpus:
        wanted["nvidia.com/gpu"] = str(math.ceil(pool.resources.num_gpus))
    return {"requests": dict(wanted), "limits": dict(wanted)}


def _volumes(config: ClusterConfig, name: str, pool: _Pool | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a pod may write (Ray's /tmp, its home), and what it reads: models, certificates, keys."""
    limit = getattr(config.kubernetes, name).ephemeral_storage
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": limit}},
        {"name": "home", "emptyDir": {"sizeLimit": "1Gi"}},
    ]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": _HOME}]

    def add(volume: str, path: str, source: dict[str, Any]) -> None:
        volumes.append({"name": volume, **source})
        mounts.append({"name": volume, "mountPath": path, "readOnly": True})

    if pool is None:
        return volumes, mounts
    if config.kubernetes.models_claim is not None:
        claim = {"claimName": config.kubernetes.models_claim, "readOnly": True}
        add("models", "/models", {"persistentVolumeClaim": claim})
    if pool.tls_folder is not None and config.kubernetes.tls_secrets:
        secret = {"secretName": f"{config.name}-{name}-tls", "defaultMode": 0o440}
        add("tls", _absolute(pool.tls_folder, f"{name}.tls_folder"), {"secret": secret})
    if isinstance(pool, RouterPool) and pool.api_keys_file is not None and config.kubernetes.api_keys_secret:
        secret = {"secretName": config.kubernetes.api_keys_secret, "defaultMode": 0o440}
        file = PurePosixPath(_absolute(pool.api_keys_file, "router.api_keys_file"))
        # The folder and not the file: a file that is mounted by itself never changes.
        add("api-keys", str(file.parent), {"secret": secret})
    return volumes, mounts


def _absolute(path: str, field: str) -> str:
    if not PurePosixPath(path).is_absolute():
        raise ConfigError(f"{field}: {path}: in a pod a path must be absolute")
    return path
