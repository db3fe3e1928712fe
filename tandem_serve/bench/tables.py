"""Benchmarks on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def print_decode(figures: dict[str, Any]) -> None:
    """The document of run_decode as a table and a line a ratio."""
    options = figures["options"]
    title = f"Decoding, batch 1, block length {options['block_length']}, temperature {options['temperature']:g}"
    title += f", {options['transport']} drafter"
    if figures["inflated"]:
        size = figures["primary_parameters_inflated"] / 1e6
        title += f"\nprimary inflated {options['inflate']}x to {size:.0f} M parameters: deeper, same outputs"
    table = _table(title, "mode", "tokens/s", "p10-p90", "accepted", "by position", "draft", "verify", "= plain")
    for name, mode in figures["modes"].items():
        same = mode["identical_prompts"]
        table.add_row(
            name,
            f"{mode['tokens_per_s']:.1f}",
            f"{mode['tokens_per_s_p10']:.0f}-{mode['tokens_per_s_p90']:.0f}",
            f"{mode['accepted_per_block']:.2f}" if mode["num_drafts"] else "",
            " ".join(f"{share:.2f}".lstrip("0") for share in mode["accepted_per_position"]),
            f"{mode['draft_ms']:.2f} ms" if mode["num_drafts"] else "",
            f"{mode['verify_ms']:.2f} ms",
            "" if same is None else f"{same}/{figures['num_prompts']}",
        )
    Console().print(table)
    _print_ratios(figures)


def print_cluster(figures: dict[str, Any], *, same_as: str = "plain") -> None:
    """The document of measure_turn_about as a table."""
    title = "Held-out prompts over HTTP, one at a time, greedy"
    columns = ("mode", "tokens/s", "p10-p90", "accepted a block", "tokens a pass", "first token", f"= {same_as}")
    table = _table(title, *columns)
    for name, mode in figures["modes"].items():
        table.add_row(
            name,
            f"{mode['tokens_per_s']:.1f}",
            f"{mode['tokens_per_s_p10']:.0f}-{mode['tokens_per_s_p90']:.0f}",
            f"{mode['accepted_per_block']:.2f}" if mode["num_drafts"] else "",
            f"{mode['mean_acceptance_length']:.2f}",
            f"{mode['time_to_first_token_ms']:.0f} ms",
            f"{mode['identical_prompts']}/{figures['num_prompts']}",
        )
    Console().print(table)
    _print_ratios(figures)


def print_engines(figures: dict[str, Any], html_file: Path | None) -> None:
    """The document of run_engines as a table a concurrency, on the terminal and in a file."""
    console = Console(record=True, width=140 if html_file else None)
    options = figures["options"]
    for concurrency, modes in figures["modes"].items():
        title = f"{concurrency} at a time, temperature {options['temperature']:g}, {options['dtype']}"
        title += f", primary inflated {options['inflate']}x" if options["inflate"] > 1 else ""
        times = ("tokens/s", "first token", "gap p50", "gap p99")
        table = _table(title, "mode", *times, "a step", "drafts", "accepted", "idle", "= plain")
        for name, mode in modes.items():
            same = mode["identical_to_plain"]
            table.add_row(
                name,
                f"{mode['tokens_per_s']:.1f}",
                f"{mode['time_to_first_token_ms']:.0f} ms",
                f"{mode['step_gap_ms_p50']:.0f} ms",
                f"{mode['step_gap_ms_p99']:.0f} ms",
                f"{mode['tokens_per_step']:.2f}",
                f"{mode['drafts_per_block']:.1f}" if mode["drafts_per_block"] else "",
                f"{mode['accepted_per_block']:.2f}" if mode["accepted_per_block"] else "",
                f"{mode['idle_share']:.0%}" if mode["idle_share"] else "",
                "" if same is None else f"{same}/{figures['num_prompts']}",
            )
        console.print(table)
    for name, ratios in figures["ratios"].items():
        console.print(f"{name}: " + ", ".join(f"{ratio:.2f}x at {at}" for at, ratio in ratios.items()))
    if html_file is not None:
        html_file.parent.mkdir(parents=True, exist_ok=True)
        console.save_html(str(html_file))


def _print_ratios(figures: dict[str, Any]) -> None:
    for name, ratio in figures["ratios"].items():
        spread = ", ".join(f"{key} {value:.3f}" for key, value in figures["ratio_spread"][name].items())
        Console().print(f"{name}: [bold]{ratio:.3f}x[/] (by prompt: {spread})")


def print_policies(figures: dict[str, Any]) -> None:
    """The document of run_policies: a table a load."""
    for cell in figures["cells"]:
        load = f"{cell['batch']} requests at once" if cell["batch"] > 1 else "one request at a time"
        title = f"Block policies, {load}, n = {cell['n']}, temperature {cell['temperature']:g}"
        if (ratio := cell.get("tandem/plain-drafter")) is not None:
            title += f"; tandem / plain drafter, each at its best fixed length: {ratio:.3f}"
        table = _table(
            title, "policy", "tokens/s", "over best fixed", "by group p10-p50-p90", "drafts", "accepted", "="
        )
        for name, policy in cell["policies"].items():
            spread = " ".join(f"{value:.2f}" for value in policy["over_best_fixed_by_group"].values())
            table.add_row(
                f"[bold]{name}[/]" if name == cell["best_fixed"] else name,
                f"{policy['tokens_per_s']:.1f}",
                f"{policy['over_best_fixed']:.3f}",
                spread,
                f"{policy['drafts_a_round']:.2f}",
                f"{policy['accepted_a_round']:.2f}",
                f"{policy['identical_groups']}/{cell['num_groups']}",
            )
        Console().print(table)


def print_steps(figures: dict[str, Any]) -> None:
    """The document of `bench steps` as a table."""
    columns = [f"{who} {dtype}" for who in ("lean", "transformers") for dtype in ("float32", "bfloat16")]
    table = _table("One-token step, batch 1, one thread", "model", *columns, "ratio")
    for name, found in figures["models"].items():
        ms = [found["step_ms"][who][dtype] for who, dtype in (column.split() for column in columns)]
        table.add_row(name, *(f"{value:.2f} ms" for value in ms), f"{found['ratio']:.2f}x")
    Console().print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


class ProgressBar:
    """A progress bar whose length is known late."""

    def __init__(self, what: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, total: int) -> Callable[[], None]:
        """Sets the length; call what it returns after each piece."""
        self._progress.update(self._task, total=total)
        return lambda: self._progress.advance(self._task)


def print_standalone(figures: dict[str, Any]) -> None:
    """The document of run_standalone as a table."""
    options = figures["options"]
    title = f"Standalone, batch 1, temperature {options['temperature']:g}"
    title += f", primary inflated {options['inflate']}x" if options["inflate"] > 1 else ""
    columns = ("writes", "tokens/s", "over ML", "accuracy", "agreement", "TV", "ML's loss on it", "ML agrees")
    table = _table(title, *columns)
    for name, mode in figures["modes"].items():
        on_text = [f"{mode[key]:.{digits}f}" if key in mode else "" for key, digits in _ON_TEXT.items()]
        table.add_row(
            name,
            f"{mode['tokens_per_s']:.1f}",
            f"{mode['over_primary']:.2f}",
            *on_text,
            f"{mode['primary_loss']:.2f}",
            f"{mode['primary_agrees']:.0f} %",
        )
    Console().print(table)


_ON_TEXT = {"accuracy": 1, "agreement": 1, "total_variation": 3}
