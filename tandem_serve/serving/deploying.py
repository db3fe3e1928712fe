"""Deploying to a Ray Serve that this process is connected to: start, read back, apply, wait.

Serve's declarative way (the one of `serve deploy` and of KubeRay) is used for every deployment, since it alone tells
changes that running replicas can take from those that need new ones, and remembers what was deployed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from tandem_serve.errors import ConfigError

if TYPE_CHECKING:
    from tandem_serve.config import ClusterConfig

READY_TIMEOUT_S = 600.0  # models of any size may have to be loaded
_POLL_INTERVAL_S = 0.2
_LOGS = "/tmp/ray/session_latest/logs/serve"


def start_serve(config: ClusterConfig, *, proxy_location: str = "HeadOnly") -> None:
    """Starts Serve's controller and proxies where none run; those that run stay as they are."""
    from ray import serve

    from tandem_serve.serving import app

    serve.start(
        proxy_location=proxy_location,
        http_options=app.http_options(config.router),
        grpc_options=app.grpc_options(config.router),
    )


def deployed_config(names: Collection[str] | None = None) -> dict[str, Any]:
    """What runs here of these applications (None: of all) as a Serve config, in the shape of app.serve_config."""
    found = details()
    if not found:
        return {"applications": []}
    return {
        "http_options": found["http_options"],
        "grpc_options": found["grpc_options"],
        "applications": [
            application["deployed_app_config"]
            for name, application in found["applications"].items()
            if application.get("deployed_app_config") and (names is None or name in names)
        ],
    }


def deploy(wanted: Mapping[str, Any], cluster: Collection[str], *, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Deploys the applications of a Serve config and waits until they run. See `submit`.

    Raises:
        ConfigError: they do not come up; says why as far as Serve knows.
    """
    submit(wanted, cluster)
    _wait_until_running([entry["name"] for entry in wanted["applications"]], timeout_s)


def submit(wanted: Mapping[str, Any], cluster: Collection[str]) -> None:
    """Tells Serve what is wanted, and no more.

    `cluster` names all that belong to the same cluster: those that `wanted` lacks end. What else this Serve runs stays.
    """
    from ray.serve.schema import ServeDeploySchema

    others = [entry for entry in deployed_config()["applications"] if entry["name"] not in cluster]
    schema = ServeDeploySchema.model_validate({**wanted, "applications": [*others, *wanted["applications"]]})
    _client().deploy_apps(schema)


def details() -> dict[str, Any]:
    """All that Serve's controller knows; empty where no Serve runs here."""
    from ray.serve.exceptions import RayServeException

    try:
        found: dict[str, Any] = _client().get_serve_details()
    except RayServeException:  # no Serve is running here
        return {}
    return found


def controller() -> Any:
    """Serve's controller, an actor."""
    return _client()._controller


def _client() -> Any:
    """Serve's own client. The public API deploys applications one by one and imperatively, or over the dashboard."""
    from ray.serve.context import _get_global_client

    return _get_global_client()


def _wait_until_running(names: list[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        applications = details()["applications"]
        states = {name: applications[name]["status"] for name in names if name in applications}
        failed = sorted(name for name, state in states.items() if state == "DEPLOY_FAILED")
        if failed or time.monotonic() > deadline:
            reasons = "; ".join(f"{name}: {_reason(applications[name])}" for name in failed or states)
            raise ConfigError(f"the cluster did not come up (logs: {_LOGS}): {reasons}")
        if len(states) == len(names) and all(state == "RUNNING" for state in states.values()):
            return
        time.sleep(_POLL_INTERVAL_S)


def _reason(application: Mapping[str, Any]) -> str:
    """The last line of what Serve says, which is that of a traceback where there is one."""
    messages = [deployment["message"] for deployment in application["deployments"].values()]
    failed = [message for message in [*messages, application["message"]] if "Error" in message]
    text = (failed or [application["message"] or str(application["status"])])[0]
    return str(text).strip().splitlines()[-1]
