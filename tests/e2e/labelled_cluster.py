"""A RayService on this machine: a Ray node for every pod it asks for, with its labels, and its Serve config deployed.

    python -m tests.e2e.labelled_cluster FILE

Prints one line of JSON (behind PLACED), where each replica runs, and lives until its standard input is closed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

PLACED = "placed: "  # Ray has things to say too
START_TIMEOUT_S = 180.0


def start(cluster_config: dict[str, Any]) -> Cluster:
    cluster = Cluster()
    cluster.add_node(**_resources(cluster_config["headGroupSpec"]), include_dashboard=False)
    for group in cluster_config["workerGroupSpecs"]:
        for _ in range(group["replicas"]):
            cluster.add_node(**_resources(group), labels=group["labels"])
    return cluster


def _resources(group: dict[str, Any]) -> dict[str, Any]:
    return {"num_cpus": int(group["rayStartParams"]["num-cpus"]), "object_store_memory": 80 << 20}


def deploy(config: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Deploys and waits. The labels of the node of every replica, by application."""
    serve.start(
        proxy_location="HeadOnly",  # all nodes share one machine's ports
        http_options=config["http_options"],
        grpc_options=config["grpc_options"],
    )
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    _wait_until_running({application["name"] for application in config["applications"]})
    labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    details = client.get_serve_details()
    return {
        name: [
            labels[replica["node_id"]]
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        ]
        for name, application in details["applications"].items()
    }


def _wait_until_running(names: set[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        found = serve.status().applications
        states = {name: application.status for name, application in found.items()}
        if states.keys() == names and set(states.values()) == {"RUNNING"}:
            return
        assert "DEPLOY_FAILED" not in states.values(), found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = yaml.safe_load(file)["spec"]
    cluster = start(spec["rayClusterConfig"])
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        print(PLACED + json.dumps(deploy(yaml.safe_load(spec["serveConfigV2"]))), flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
