"""The drafter replica: an engine behind a gRPC server. Serve's deployment and the plain process share it."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.metrics import DrafterMetrics
from tandem_serve.rpc.tls import PeerTls
from tandem_serve.serving.autoscaling import DrafterSignals, Totals
from tandem_serve.tracing import SpanSink, discard
from tandem_serve.types import DrafterInfo


class DrafterReplica:
    """Runs from construction to `close`. Primaries connect to `address`."""

    def __init__(
        self,
        model: str,
        config: DrafterEngineConfig,
        *,
        num_threads: int = 1,
        host: str = "127.0.0.1",
        port: int = 0,
        spans: SpanSink = discard,
        tls_folder: str | None = None,
    ) -> None:
        """Loads the model, starts the engine and serves it.

        Raises:
            CheckpointError, ConfigError (certificates), OSError (the port is taken).
        """
        import torch  # here: who only describes a cluster (app.py) has no use for it

        from tandem_serve.rpc.drafting_server import DraftingServer
        from tandem_serve.serving.engines import build_drafter

        tls = PeerTls(tls_folder) if tls_folder else None
        torch.set_num_threads(num_threads)
        self.registry = CollectorRegistry()
        self._steps, self._waits, self._asked_at_s = Totals(), Totals(), time.monotonic()
        self._engine = build_drafter(model, config, metrics=DrafterMetrics(self.registry), spans=spans)
        self._server = DraftingServer(self._engine, config, host=host, port=port, tls=tls)
        self._engine.start()
        self._server.start()

    @property
    def address(self) -> str:
        return self._server.address

    async def info(self, replica_id: str | None = None) -> DrafterInfo:
        return self._engine.info

    def signals(self) -> DrafterSignals:
        """What decides how many drafters there should be; of the time since the last call."""

        def figure(name: str) -> float:
            return self.registry.get_sample_value(name) or 0.0

        def since(totals: Totals, name: str) -> tuple[float, float]:
            return totals.since(figure(f"{name}_sum"), figure(f"{name}_count"))

        work_s, _ = since(self._steps, "tandem:drafter_step_seconds")
        wait_s, num_waits = since(self._waits, "tandem:drafter_wait_seconds")
        now_s = time.monotonic()
        elapsed_s, self._asked_at_s = now_s - self._asked_at_s, now_s
        return DrafterSignals(
            busy=min(work_s / max(elapsed_s, 1e-3), 1.0),
            kv_cache_usage=figure("tandem:drafter_kv_cache_usage_perc"),
            mean_wait_s=wait_s / num_waits if num_waits else None,
        )

    def close(self) -> None:
        """Ends every stream: the primaries go on alone, or with another drafter."""
        self._server.stop()
        self._engine.stop()
