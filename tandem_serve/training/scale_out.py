"""Training on several workers with Ray Train. The only module of training/ that knows Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tandem_serve.errors import ConfigError, TandemError

_ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}


def run_on_workers(work: Callable[[], Any], num_workers: int, *, device: str, folder: Path) -> None:
    """Runs `work` in each of num_workers processes that form one process group, to its end.

    Uses the Ray cluster that RAY_ADDRESS names, else a local one. `folder` must be the same place for all workers (a
    shared file system, where there are several nodes), and paths in `work` absolute: workers have another directory.

    Raises:
        ConfigError: where Ray Train's own dependencies are missing.
        TandemError: where a worker failed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ConfigError(f"several workers need Ray Train: pip install 'tandem-serve[train]' ({error})") from None
    on_gpu = torch.device(device).type == "cuda"
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS", "local")
        resources: dict[str, Any] = {"num_cpus": max(num_workers, os.cpu_count() or 1)} if address == "local" else {}
        ray.init(
            address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING, **resources
        )
    try:
        TorchTrainer(
            _loop,
            train_loop_config={"work": work, "num_threads": torch.get_num_threads()},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=on_gpu),
            run_config=RunConfig(name="ray", storage_path=str(folder.resolve())),
        ).fit()
    except Exception as error:  # Ray Train wraps a worker's own exception in several of its types
        raise TandemError(f"training on {num_workers} workers failed: {error}") from error
    finally:
        if started:
            ray.shutdown()


def _loop(config: dict[str, Any]) -> None:
    torch.set_num_threads(config["num_threads"])
    config["work"]()
