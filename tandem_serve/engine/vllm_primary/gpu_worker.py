"""The worker of GPU builds of vLLM."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from tandem_serve.engine.vllm_primary.worker import TandemWorker


class TandemGpuWorker(TandemWorker, Worker):  # type: ignore[misc]
    """vLLM's GPU worker, with taps and shared noise."""
