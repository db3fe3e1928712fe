"""An OTLP endpoint that takes traces and keeps their number: what benchmarks export to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class SpanCounter:
    """Serves from construction to `close`. An empty answer is what a collector that took everything says."""

    def __init__(self) -> None:
        self.num_exports = 0
        self._server = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="span-counter"))
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()

    def _export(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        self.num_exports += 1
        return b""
