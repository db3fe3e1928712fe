"""Discovery of replicas under Ray Serve, by the metadata that they publish (`record_replica_metadata`).

Serve tells every handle's request router which replicas run; this request router passes that on to its process's
registry.REGISTRY. So routers learn the primaries, and routers and primaries the drafters' addresses, from the
controller's own broadcast: no name service, and it survives a restart of the controller.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

REQUEST_ROUTER_PATH = "tandem_serve.serving.discovery:DiscoveryRouter"


class DiscoveryRouter(FIFOMixin, RequestRouter):
    """Publishes the replicas of a deployment, and sends each call to the replica that its `replica_id` argument names.

    A call that names none, or one that is gone, goes to any replica. Serve pickles this class by value: what it needs
    at run time is imported where it is needed, so that there is one registry a process.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        from tandem_serve.serving.registry import NODE, REGISTRY

        super().update_replicas(replicas)
        found = {r.replica_id.unique_id: {**r.replica_metadata, NODE: r.node_id} for r in replicas}
        REGISTRY.publish(self.app_name, found)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.kwargs.get("replica_id") if pending_request is not None else None
        named = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [named or candidate_replicas]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Gives the replica to the very call that it was chosen for; FIFOMixin gives it to the oldest one waiting.

        (RequestRouter's own rule goes by a request id that all calls made on behalf of one client share.)
        """
        waiting = self._pending_requests_to_fulfill
        for index, pending in enumerate(waiting):
            if pending.metadata is request_metadata:
                del waiting[index]
                waiting.appendleft(pending)
                break
        super()._fulfill_next_pending_request(replica, request_metadata)
