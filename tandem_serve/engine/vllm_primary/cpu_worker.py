"""The worker of CPU builds of vLLM."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from tandem_serve.engine.vllm_primary.worker import TandemWorker


class TandemCpuWorker(TandemWorker, CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker, with taps and shared noise."""
