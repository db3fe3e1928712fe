"""Model cards: the README.md of a trained model's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HEADER = "---\nlicense: apache-2.0\nlanguage: code\npipeline_tag: text-generation\n---\n\n"


def write_primary_card(folder: Path, provenance: Mapping[str, Any], figures: Mapping[str, float], run_s: float) -> None:
    """A primary's card: what it is, how it was made, how good it is."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    text = (
        f"{_HEADER}# Demo primary\n\nA small Llama-style language model of Python code: {config['num_hidden_layers']} "
        f"layers, width {config['hidden_size']}, vocabulary {config['vocab_size']}. It exists to demonstrate and "
        "test tandem decoding on real weights; it is no useful assistant.\n\n"
        f"## Held-out text\n\nLoss {figures['loss']:.3f} nats a token, accuracy {figures['accuracy']:.1f} %, on "
        f"{figures['num_tokens']:,.0f} tokens of modules it was not trained on.\n\n"
        f"{_recipe(provenance, run_s)}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_drafter_card(
    folder: Path, title: str, provenance: Mapping[str, Any], figures: Mapping[str, Any], run_s: float
) -> None:
    """A drafter's card. `figures` is its part of evaluate_pair's report; the longest block length is described."""
    rows = "".join(
        f"| {length} | {f['accuracy']:.1f} | {f['agreement']:.1f} | "
        f"{f['cross_entropy']:.3f} | {f['total_variation']:.3f} |\n"
        for length, f in figures["text"]["block_lengths"].items()
    )
    length, drafting = list(figures["drafting"]["0"]["block_lengths"].items())[-1]
    positions = " ".join(f"{x:.2f}" for x in drafting["accepted_per_position"])
    text = (
        f"{_HEADER}# {title}\n\nDrafts for the demo primary beside it, and for no other model.\n\n"
        "## Held-out text\n\n| block length | accuracy | agrees with the primary | CE | TV to the primary |\n"
        f"|---|---|---|---|---|\n{rows}\n"
        f"On the primary's own greedy continuations of held-out prompts, blocks of {length}: "
        f"**{drafting['accepted_per_block']:.2f}** drafts accepted a block (by position: {positions}); "
        f"agreement with the primary {drafting['agreement']:.1f} %.\n\n"
        f"{_recipe(provenance, run_s)}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _recipe(provenance: Mapping[str, Any], run_s: float) -> str:
    held_out = "\n".join(f"- `{name}`" for name in provenance.get("held_out", ()))
    facts = "".join(f"- {name}: `{value}`\n" for name, value in provenance.items() if name != "held_out")
    return (
        f"## Recipe\n\nTrained in {run_s / 60:.0f} minutes. `make train-demo` does it again.\n\n{facts}\n"
        f"Modules held out of training:\n\n{held_out}\n"
    )
