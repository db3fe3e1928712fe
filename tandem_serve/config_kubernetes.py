"""The `kubernetes` part of a cluster file: what pods need beyond what the pools say (serving/kubernetes.py)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PodConfig(_Part):
    """One pool's pods; a pod holds one replica, and its GPUs are the replica's."""

    image: str | None = None  # None: the cluster's
    cpu: str = "2"
    memory: str = Field("4Gi", pattern=r"^[0-9]+[KMGT]i?$")
    ephemeral_storage: str = Field("4Gi", pattern=r"^[0-9]+[KMGT]i?$")  # Ray's logs; the root file system is read-only
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[dict[str, Any]] = Field(default_factory=list)  # as Kubernetes spells them


class KubernetesConfig(_Part):
    """A RayService of KubeRay."""

    image: str = "tandem-serve:0.1.0-cpu"
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    models_claim: str | None = None  # a PersistentVolumeClaim, mounted read-only at /models; None: the image's own
    tls_secrets: bool = True  # mounts the secrets tandem-{pool}-tls where the pools' tls_folder is
    api_keys_secret: str | None = "tandem-api-keys"  # mounted where router.api_keys_file is
    # A changed pod is a new Ray cluster. With a gateway class, traffic moves over step by step; else at once.
    gateway_class: str | None = None
    head: PodConfig = PodConfig(cpu="2", memory="6Gi")
    router: PodConfig = PodConfig()
    primary: PodConfig = PodConfig()
    drafter: PodConfig = PodConfig()
