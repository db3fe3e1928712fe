"""The training loop: one for primaries and drafters, resumable, logged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from tandem_serve.errors import ConfigError
from tandem_serve.training.optimizer import ModelOptimizer, OptimizerConfig, rate_factor
from tandem_serve.training.run_folder import RunFolder
from tandem_serve.training.workers import average_gradients, average_values, leads


class Task(Protocol):
    """What a run optimizes: some models, and a loss for each of them at each step.

    Losses must be functions of the step and the weights alone; then a resumed run repeats what a kill took away.
    """

    @property
    def models(self) -> Mapping[str, nn.Module]: ...

    @property
    def tokens_per_step(self) -> int: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Whatever must not change between a run and its resumption, as plain values."""
        ...

    def losses(self, step: int, num_steps: int) -> dict[str, Tensor]:
        """One scalar per model that has a loss of its own, by the same names; their sum is what falls."""
        ...


@dataclass(frozen=True)
class TrainerConfig:
    num_steps: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rate_scales: Mapping[str, float] = field(default_factory=dict)  # of some models' learning rates, by name
    precision: str = "auto"  # bf16 | fp32 | auto
    device: str = "cpu"
    checkpoint_interval_s: float = 45.0
    log_every: int = 10  # steps
    quiet: bool = False  # no progress bar


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """bf16 autocast where asked for; `auto` uses it on a GPU and on a CPU that multiplies bf16 (AVX-512 BF16 or AMX).

    Other CPUs widen bf16 to float32 first, and the casts cost more than they save.

    Raises:
        ConfigError: for another name.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision {precision!r}: expected auto, bf16 or fp32")
    kind = torch.device(device).type
    multiplies_bf16 = kind == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    wanted = precision == "bf16" or (precision == "auto" and multiplies_bf16)
    return torch.autocast(kind, torch.bfloat16) if wanted else contextlib.nullcontext()


class Trainer:
    """Runs a task from the folder's state, or from the start, to the last step.

    Of several workers each runs its own, on its share of every batch; the leading one alone logs and saves.
    """

    def __init__(self, task: Task, config: TrainerConfig, folder: RunFolder) -> None:
        self._task = task
        self._config = config
        self._folder = folder
        self._optimizers = {name: ModelOptimizer(m, config.optimizer) for name, m in task.models.items()}
        self._step = 0
        self._elapsed_s = 0.0

    def resume(self) -> bool:
        """Takes up the folder's state if it holds one.

        Raises:
            ConfigError: where the state belongs to another run (other data, shapes or seeds).
        """
        if not self._folder.has_state:
            return False
        state = self._folder.load_state()
        if state["identity"] != dict(self._task.identity):
            raise ConfigError(
                f"{self._folder.path} holds the state of another run ({state['identity']} instead of "
                f"{dict(self._task.identity)}); choose another folder, or --no-resume to start over"
            )
        for name, model in self._task.models.items():
            model.load_state_dict(state["models"][name])
            self._optimizers[name].load_state_dict(state["optimizers"][name])
        self._step, self._elapsed_s = state["step"], state["elapsed_s"]
        if leads():
            self._folder.truncate_log(self._step)
        return True

    def run(self) -> None:
        """Trains to the end. State is saved on a time interval and at the end."""
        config, start = self._config, time.monotonic() - self._elapsed_s
        saved = time.monotonic()
        with _progress(config.quiet or not leads()) as bar:
            shown = bar.add_task("training", total=config.num_steps, completed=self._step, note="")
            while self._step < config.num_steps:
                record = self._one_step()
                self._step += 1
                self._elapsed_s = time.monotonic() - start
                rate = self._step * self._task.tokens_per_step / self._elapsed_s
                if leads() and (record["step"] % config.log_every == 0 or self._step == config.num_steps):
                    self._folder.log({**record, "tokens_per_s": round(rate, 1), "elapsed_s": round(self._elapsed_s, 1)})
                losses = " ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
                bar.update(shown, completed=self._step, note=f"{rate:,.0f} tokens/s  loss {losses}")
                if time.monotonic() - saved > config.checkpoint_interval_s:
                    self._save()
                    saved = time.monotonic()
        self._save()

    def _one_step(self) -> dict[str, Any]:
        config = self._config
        with autocast(config.precision, config.device):
            losses = self._task.losses(self._step, config.num_steps)
        torch.stack(list(losses.values())).sum().backward()
        average_gradients(p for model in self._task.models.values() for p in model.parameters())
        rate = rate_factor(self._step, config.num_steps, config.optimizer)
        norms = {name: o.step(rate * config.rate_scales.get(name, 1.0)) for name, o in self._optimizers.items()}
        return {
            "step": self._step,
            "tokens": (self._step + 1) * self._task.tokens_per_step,
            "losses": {name: round(loss, 5) for name, loss in average_values(losses).items()},
            "gradient_norms": {name: round(norm, 4) for name, norm in norms.items()},
            "rate": round(rate, 5),
        }

    def _save(self) -> None:
        if not leads():
            return
        self._folder.save_state(
            {
                "identity": dict(self._task.identity),
                "step": self._step,
                "elapsed_s": self._elapsed_s,
                "models": {name: model.state_dict() for name, model in self._task.models.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            }
        )


def _progress(quiet: bool) -> Progress:
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    ]
    columns += [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    return Progress(*columns, disable=quiet)
