"""The report's plots: each one document's figures as an SVG image."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tandem_serve.bench.report import paper
from tandem_serve.bench.report.documents import Documents
from tandem_serve.bench.report.tables import middle, projected_speed, trained_lengths
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


Draw = Callable[[Any], None]  # draws on an axes, or on a list of them where there are several panels


def _drawings(documents: Documents) -> Iterator[tuple[str, int, Draw]]:
    for name, document in documents.evals.items():
        yield f"{name}: by block length", 2, partial(_block_lengths, document=document)
        yield f"{name}: by position in the block", 2, partial(_positions, document=document)
        for drafter_name, drafter in document["drafters"].items():
            if "couplings" in drafter:
                title = f"{name}: {drafter_name}, how drafts are coupled"
                yield title, 2, partial(_couplings, couplings=drafter["couplings"])
    if len(documents.evals) > 1:
        yield "Accepted drafts a block, by domain", 1, partial(_domains, evals=documents.evals)
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
        yield "Training losses", 1, partial(_losses, trainings=documents.trainings)


def _block_lengths(axes: Any, document: dict[str, Any]) -> None:
    """Accepted drafts and projected speed-up over the block length; one line a drafter and temperature."""
    for label, drafting in _lines(document):
        lengths = [int(g) for g in drafting["block_lengths"]]
        figures = list(drafting["block_lengths"].values())
        axes[0].plot(lengths, [f["accepted_per_block"] for f in figures], marker="o", label=label)
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
    names = list(dict.fromkeys(name for document in evals.values() for name in document["drafters"]))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        heights = []
        for document in evals.values():
            drafter = document["drafters"].get(name)
            drafting = next(iter(drafter["drafting"].values())) if drafter else None
            heights.append(middle(drafting["block_lengths"])[1]["accepted_per_block"] if drafting else 0)
        axes[0].bar([i + place * width for i in range(len(evals))], heights, width, label=name)
    axes[0].set_xticks([i + 0.4 for i in range(len(evals))], list(evals), rotation=20)
    _label(axes[0], "", "accepted drafts a block")


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
    """One point a mode, named; what was measured on held-out text against measured speed."""
    for name, figures in document["modes"].items():
        if "accuracy" in figures:
            axes[0].scatter([figures["over_primary"]], [figures["accuracy"]])
            axes[0].annotate(name, (figures["over_primary"], figures["accuracy"]), fontsize=7)
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
    for run, records in trainings.items():
        for name in records[0]["losses"]:
            points = [(r["tokens"], r["losses"][name]) for r in records if name in r["losses"]]
            axes[0].plot(*zip(*points, strict=True), label=f"{run}: {name}", linewidth=1)
    _label(axes[0], "tokens", "loss")


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
    figure = Figure(figsize=(5.5 * panels, 3.8), layout="constrained")
    draw(figure.subplots(1, panels, squeeze=False)[0])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
