"""Standalone tandem beside ML, MS alone and other models: speed and quality of text that nobody verifies.

Speed is measured, prompt by prompt in turn in one process. Quality is measured twice: on the text that each mode wrote
(what ML makes of it), and on held-out text, where a block length's accuracy is exact (training/evaluate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem_serve.bench.decode import Mode, TimedDecoder
from tandem_serve.bench.prompts import load_prompts
from tandem_serve.bench.run_decode import provenance
from tandem_serve.bench.summary import PromptRun, quantile, summarize
from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig
from tandem_serve.engine.drafter import DrafterEngine
from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.errors import ConfigError
from tandem_serve.models.checkpoint import drafter_info, load_decoder, load_drafter, load_tokenizer, primary_info
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.inflate import inflate
from tandem_serve.training.evaluate import evaluate_on_text
from tandem_serve.training.evaluate_pair import EvaluationPlan, text_windows
from tandem_serve.training.held_out import evaluation_documents
from tandem_serve.training.primary import sequence_logits
from tandem_serve.types import DecodingMode, SamplingParams

KIND = "standalone"
PRIMARY, ENDLESS = "primary", "tandem-endless"  # gamma 0 and infinity
VARIANTS = {"tandem": DecodingMode.TANDEM, "representations": DecodingMode.TANDEM_REPRESENTATIONS}
_NUM_WARMUP = 2


@dataclass(frozen=True)
class StandaloneOptions:
    """The command's options, checked by the command line."""

    pair: Path
    prompts: str
    field: str
    limit: int
    block_lengths: tuple[int, ...]
    models: Mapping[str, str]  # further models that write alone, folders by name
    max_tokens: int
    temperature: float
    inflate: int
    data: str  # text for accuracy, as for `eval`
    num_windows: int  # batches of 8 x 256 tokens of held-out text
    num_threads: int


def run_standalone(options: StandaloneOptions, announce: Callable[[int], Callable[[], None]]) -> dict[str, Any]:
    """Measures; returns the JSON document. `announce` hears the number of runs, returns what to call after each.

    Raises:
        CheckpointError, ConfigError: a model that cannot be loaded, or prompts that cannot be read.
    """
    torch.set_num_threads(options.num_threads)
    folder = options.pair / "primary"
    primary, tokenizer = load_decoder(folder), load_tokenizer(folder)
    longest = primary_info(folder).max_model_len - options.max_tokens
    prompts = load_prompts(options.prompts, options.field, options.limit, tokenizer, folder, longest)
    for name, path in options.models.items():
        if primary_info(path).tokenizer_hash != primary_info(folder).tokenizer_hash:
            raise ConfigError(
                f"--model {name}: {path} has another tokenizer than the primary: their figures do not compare"
            )
    quality = _quality_on_text(options, primary, folder)
    modes = _modes(options, inflate(primary, options.inflate) if options.inflate > 1 else primary)
    done = announce(len(modes) * len(prompts))
    runs = _run(options, modes, prompts, done)
    primary = load_decoder(folder)  # unpacked and not inflated: the judge of what was written
    measured = {
        name: {
            **_speed(runs[name], runs[PRIMARY]),
            **_judged(primary, prompts, runs[name], options.temperature),
            **quality.get(name, {}),
        }
        for name in runs
    }
    return {
        "kind": KIND,
        "modes": measured,
        "num_prompts": len(prompts),
        "options": {**vars(options), "pair": options.pair.name},
        "provenance": provenance(),
    }


def _modes(options: StandaloneOptions, primary: Decoder) -> dict[str, tuple[Mode, TimedDecoder]]:
    """An engine for each: ML, every block length in both variants, blocks without end, and the further models."""
    folder, drafter_folder = options.pair / "primary", options.pair / "drafter"
    primary.pack()
    drafter, drafter_config = load_drafter(drafter_folder).pack(), DrafterEngineConfig()
    info = drafter_info(drafter_folder, max_block_length=drafter_config.max_block_length)
    config = PrimaryEngineConfig(max_num_seqs=1, draft_timeout_s=30.0)  # never: a benchmark waits
    timed = TimedDecoder(primary)

    def tandem(name: str, decoding: DecodingMode, block_length: int) -> tuple[Mode, TimedDecoder]:
        engine = DrafterEngine(drafter, info, drafter_config)
        factory = local_link_factory({"d": engine}, synchronous=True)
        mode = Mode(name, primary, primary_info(folder), config, factory, "d")
        mode.decoding, mode.block_length = decoding, block_length
        return mode, timed

    modes = {PRIMARY: (Mode(PRIMARY, primary, primary_info(folder), config, None), timed)}
    for variant, decoding in VARIANTS.items():
        for length in options.block_lengths:
            modes[f"{variant}-{length}"] = tandem(f"{variant}-{length}", decoding, length)
    modes[ENDLESS] = tandem(ENDLESS, DecodingMode.TANDEM, options.max_tokens)
    for name, path in options.models.items():
        model = load_decoder(path).pack()
        modes[name] = Mode(name, model, primary_info(path), config, None), TimedDecoder(model)
    return modes


def _run(
    options: StandaloneOptions,
    modes: Mapping[str, tuple[Mode, TimedDecoder]],
    prompts: Sequence[tuple[int, ...]],
    done: Callable[[], None],
) -> dict[str, list[PromptRun]]:
    """Every prompt in every mode, the order turning by one each time."""
    runs: dict[str, list[PromptRun]] = {name: [] for name in modes}
    names = list(modes)
    for turn in range(-_NUM_WARMUP, len(prompts)):
        sampling = SamplingParams(temperature=options.temperature, seed=max(turn, 0))
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            mode, decoder = modes[name]
            run = mode.run(prompts[max(turn, 0)], options.max_tokens, sampling, decoder)
            if turn >= 0:
                runs[name].append(run)
                done()
    for mode, _ in modes.values():
        mode.close()
    return runs


def _speed(runs: Sequence[PromptRun], reference: Sequence[PromptRun]) -> dict[str, Any]:
    rate, base = (summarize(of_one, None)["tokens_per_s"] for of_one in (runs, reference))
    by_prompt = sorted(a.tokens_per_s / b.tokens_per_s for a, b in zip(runs, reference, strict=True))
    spread = {f"p{round(100 * q)}": quantile(by_prompt, q) for q in (0.1, 0.5, 0.9)}
    return {"tokens_per_s": rate, "over_primary": rate / base, "over_primary_by_prompt": spread}


@torch.inference_mode()
def _judged(
    primary: Decoder, prompts: Sequence[tuple[int, ...]], runs: Sequence[PromptRun], temperature: float
) -> dict[str, float]:
    """What ML makes of the texts: its loss on them in nats, and the share of tokens, %, that are its first choice."""
    loss = hits = count = 0.0
    for prompt, run in zip(prompts, runs, strict=True):
        text = torch.tensor([[*prompt, *run.token_ids]])
        logits = sequence_logits(primary, text[:, :-1])[0, len(prompt) - 1 :].float()
        written = text[0, len(prompt) :]
        loss -= float(logits.log_softmax(-1).gather(-1, written.unsqueeze(-1)).sum())
        hits += float((logits.argmax(-1) == written).sum())
        count += len(written)
    return {"primary_loss": loss / count, "primary_agrees": 100 * hits / count, "temperature": temperature}


def _quality_on_text(options: StandaloneOptions, primary: Decoder, folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy and the like on held-out text by mode.

    Both variants write the same block behind the same text. After it, `tandem` has ML write a token of its own.
    """
    documents = evaluation_documents(options.data, options.field, folder)
    plan = EvaluationPlan(num_windows=options.num_windows)
    windows = text_windows(documents, primary, load_tokenizer(folder), plan)
    lengths = options.block_lengths
    measured = evaluate_on_text(primary, load_drafter(options.pair / "drafter"), windows, lengths)
    found: dict[str, dict[str, float]] = {PRIMARY: measured["primary"]}
    for length in lengths:
        block = measured["block_lengths"][str(length)]
        found[f"representations-{length}"] = block
        found[f"tandem-{length}"] = _with_a_token_of_the_primary(block, measured["primary"], length)
    for name, path in options.models.items():
        found[name] = _alone(primary, load_decoder(path), windows, lengths)
    return found


def _with_a_token_of_the_primary(block: Mapping[str, float], own: Mapping[str, float], length: int) -> dict[str, float]:
    """The mean over a block of so many drafts and the token that ML writes itself."""
    return {name: (length * block[name] + own[name]) / (length + 1) for name in own}


def _alone(
    primary: Decoder, model: Decoder, windows: Sequence[Tensor], block_lengths: Sequence[int]
) -> dict[str, float]:
    """A model without taps, at the positions where the block lengths were measured: it says the same at each place."""
    figures: dict[str, float] = evaluate_on_text(primary, model, windows, block_lengths)["block_lengths"][
        str(max(block_lengths))
    ]
    return figures
