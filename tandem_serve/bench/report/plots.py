"""The report's plots: each one document's figures as an SVG image."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tandem_serve.bench.report import paper
from tandem_serve.bench.report.bench_tables import LOAD, load_of
from tandem_serve.bench.report.documents import Documents
from tandem_serve.bench.report.eval_tables import by_domain, nearest, projected_speed, trained_lengths
from tandem_serve.errors import ConfigError


@dataclass(frozen=True)
class Plot:
    """A title and an image as a data URI."""

    title: str
    uri: str


def all_plots(documents: Documents) -> list[Plot]:
    """Those that the documents have something for.

    Raises:
        ConfigError: where matplotlib is not installed.
    """
    return [Plot(title, _image(draw, panels)) for title, panels, draw in _drawings(documents)]


Draw = Callable[[Any], None]  # draws on a list of axes, one a panel
_MOST_COLUMNS = 3


def _drawings(documents: Documents) -> Iterator[tuple[str, int, Draw]]:
    for name, document in documents.evals.items():
        yield f"{name}: by block length", 2, partial(_block_lengths, document=document)
        yield f"{name}: by position in the block", 2, partial(_positions, document=document)
        for drafter_name, drafter in document["drafters"].items():
            if "couplings" in drafter:
                title = f"{name}: {drafter_name}, how drafts are coupled"
                yield title, 2, partial(_couplings, couplings=drafter["couplings"])
    if domains := by_domain(documents.evals):
        yield "Accepted drafts a block, by domain", 1, partial(_domains, evals=domains)
    for name, document in documents.policies.items():
        yield f"{name}: block policies", 2, partial(_policies, document=document)
    inflated = {d["options"].get("inflate", 1) for d in documents.decodes.values()}
    if len(inflated) > 1:
        yield "Measured speed-up by the primary's inflation", 1, partial(_inflation, decodes=documents.decodes)
    for name, document in documents.standalones.items():
        yield f"{name}: accuracy and speed of unverified text", 1, partial(_standalone, document=document)
    for name, document in documents.routers.items():
        bins = {key: p["bins"] for key, p in document["calibration"].items() if isinstance(p, dict) and p.get("bins")}
        if bins:
            yield f"{name}: reliability", 1, partial(_reliability, bins=bins)
    if documents.trainings:
        yield "Training losses", len(documents.trainings), partial(_losses, trainings=documents.trainings)


def _block_lengths(axes: Any, document: dict[str, Any]) -> None:
    """Accepted drafts and projected speed-up over the block length; one line a drafter and temperature."""
    for label, drafting in _lines(document):
        lengths = [int(g) for g in drafting["block_lengths"]]
        figures = list(drafting["block_lengths"].values())
        errors = [f.get("accepted_per_block_error") or 0.0 for f in figures]
        axes[0].errorbar(
            lengths, [f["accepted_per_block"] for f in figures], errors, marker="o", capsize=2, label=label
        )
        speeds = [projected_speed(document, f, paper.COST_RATIO) for f in figures]
        axes[1].plot(lengths, speeds, marker="o", label=label)
    _label(axes[0], "block length", "accepted drafts a block")
    _label(axes[1], "block length", f"projected speed-up, ML:MS {paper.COST_RATIO}")


def _positions(axes: Any, document: dict[str, Any]) -> None:
    for label, drafting in _lines(document):
        longest = list(drafting["block_lengths"].values())[-1]["accepted_per_position"]
        axes[0].plot(range(1, len(longest) + 1), longest, marker="o", label=label)
    for name, drafter in document["drafters"].items():
        if "text" in drafter:
            agreement = drafter["text"]["by_position"]["agreement"]
            axes[1].plot(range(1, len(agreement) + 1), agreement, marker="o", label=name)
    _label(axes[0], "position in the block", "share of blocks accepted so far")
    _label(axes[1], "position in the block", "agreement with ML on text, %")


def _lines(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, drafter in document["drafters"].items():
        lengths = trained_lengths(drafter)
        for temperature, drafting in drafter["drafting"].items():
            yield f"{name}{f' (trained with {lengths})' if lengths else ''}, T {temperature}", drafting


def _couplings(axes: Any, couplings: dict[str, Any]) -> None:
    temperatures = [float(t) for t in couplings]
    for ax, what in zip(axes, ("token", "block"), strict=True):
        for name in next(iter(couplings.values()))[what]:
            values = [of_t[what][name] for of_t in couplings.values()]
            ax.plot(temperatures, values, marker="o", label=name.replace("_", " "))
    _label(axes[0], "temperature", "chance that a draft is accepted")
    _label(axes[1], "temperature", "expected accepted drafts a block")


def _domains(axes: Any, evals: dict[str, dict[str, Any]]) -> None:
    """Bars by drafter and temperature, beside each other for each text."""
    bars: dict[str, dict[int, float]] = {}
    for place, document in enumerate(evals.values()):
        for name, drafter in document["drafters"].items():
            for temperature, drafting in drafter["drafting"].items():
                _, figures = nearest(drafting["block_lengths"], 5)
                bars.setdefault(f"{name}, T {temperature}", {})[place] = figures["accepted_per_block"]
    _bars(axes[0], bars, list(evals))
    _label(axes[0], "", "accepted drafts a block of 5")


def _policies(axes: Any, document: dict[str, Any]) -> None:
    """Adaptive policies over the best fixed length, a group of bars a load; and tokens/s over the fixed length."""
    ratios: dict[str, dict[int, float]] = {}
    loads = []
    for place, cell in enumerate(document["cells"]):
        load = dict(zip(LOAD, load_of(document, cell), strict=True))
        loads.append(f"batch {load['batch']}, n {load['n']}, T {load['temperature']}")
        fixed: dict[str, list[tuple[int, float]]] = {}
        for name, figures in cell.get("policies", {}).items():
            kind, _, length = name.rpartition("-")
            if kind.endswith("fixed"):
                fixed.setdefault(kind.removesuffix("fixed").rstrip(":") or "tandem", []).append(
                    (int(length), figures["tokens_per_s"])
                )
            else:
                ratios.setdefault(name, {})[place] = figures["over_best_fixed"]
        for drafter, points in fixed.items():
            axes[1].plot(*zip(*sorted(points), strict=True), marker="o", label=f"{drafter}, {loads[-1]}")
    _bars(axes[0], ratios, loads)
    for value in paper.ADAPTIVE["over fixed"]:
        axes[0].axhline(value, color="grey", linestyle=":", linewidth=1)
    axes[0].axhline(1, color="black", linewidth=1)
    axes[0].set_ylim(bottom=min([0.8, *(height for of_name in ratios.values() for height in of_name.values())]) - 0.05)
    _label(axes[0], "", "over the best fixed length (dotted: the paper)")
    _label(axes[1], "fixed block length", "tokens/s")


def _bars(ax: Any, heights: dict[str, dict[int, float]], places: list[str]) -> None:
    """A bar for each name at each place where it has one."""
    width = 0.8 / max(1, len(heights))
    for number, (name, of_name) in enumerate(heights.items()):
        ax.bar([place + number * width for place in of_name], list(of_name.values()), width, label=name)
    ax.set_xticks([i + 0.4 for i in range(len(places))], places, rotation=20)


def _inflation(axes: Any, decodes: dict[str, dict[str, Any]]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for document in decodes.values():
        options = document["options"]
        for ratio, value in document["ratios"].items():
            label = f"{ratio}, T {options.get('temperature', 0):g}, blocks of {options.get('block_length')}"
            lines.setdefault(label, []).append((options.get("inflate", 1), value))
    for label, points in lines.items():
        axes[0].plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    _label(axes[0], "inflation of the primary", "speed-up")


def _standalone(axes: Any, document: dict[str, Any]) -> None:
    """What was measured on held-out text against measured speed: a line a variant over its block lengths, and a point
    for each model that writes alone.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for name, figures in document["modes"].items():
        if "accuracy" in figures:
            kind, _, length = name.rpartition("-")
            kind, length = (kind, length) if kind in ("tandem", "representations") else (name, "")
            point = figures["over_primary"], figures["accuracy"]
            points.setdefault(kind, []).append(point)
            axes[0].annotate(length if length.isdecimal() else name, point, fontsize=7)
    for name, of_one in points.items():
        axes[0].plot(
            *zip(*of_one, strict=True), marker="o", label=f"{name}, by block length" if len(of_one) > 1 else name
        )
    _label(axes[0], "speed, over ML alone", "accuracy on held-out text, %")


def _reliability(axes: Any, bins: dict[str, list[dict[str, float]]]) -> None:
    """The share of right drafts over the predicted one; a marker's area is the bin's share of all drafts."""
    axes[0].plot([0, 1], [0, 1], color="grey", linestyle=":")
    for predictor, of_one in bins.items():
        total = sum(b["count"] for b in of_one) or 1
        sizes = [10 + 400 * b["count"] / total for b in of_one]
        axes[0].scatter(
            [b["score"] for b in of_one], [b["accepted"] for b in of_one], sizes, label=predictor, alpha=0.7
        )
    _label(axes[0], "predicted share of right drafts", "share of right drafts")


def _losses(axes: Any, trainings: dict[str, list[dict[str, Any]]]) -> None:
    for ax, (run, records) in zip(axes, trainings.items(), strict=True):
        for name in records[0]["losses"]:
            points = [(r["tokens"], r["losses"][name]) for r in records if name in r["losses"]]
            ax.plot(*zip(*points, strict=True), label=name, linewidth=1)
        ax.set_title(run)
        _label(ax, "tokens", "loss")


def _label(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)


def _image(draw: Draw, panels: int) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a report needs matplotlib: pip install 'tandem-serve[train]'") from None
    columns = min(panels, _MOST_COLUMNS)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[panels:]:
        unused.axis("off")
    draw(axes[:panels])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
