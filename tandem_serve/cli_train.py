"""`tandem-serve train primary|drafter|router`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tandem_serve.cli_errors import reported
from tandem_serve.errors import ConfigError

if TYPE_CHECKING:
    from tandem_serve.training.corpus import Document

app = typer.Typer(help="Train a primary, or drafters for one.", no_args_is_help=True)

Data = Annotated[
    str, typer.Option(help="stdlib, a text file, a folder, or a Hugging Face dataset owner/name[:split[:column]].")
]
Out = Annotated[Path, typer.Option(help="The run's folder: state, log, provenance; models beneath it.")]
Tokens = Annotated[str, typer.Option(help="Training budget in tokens, e.g. 500k or 5M.")]
Threads = Annotated[int, typer.Option(min=0, help="torch threads; 0 leaves torch's choice.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="auto, bf16 (autocast) or fp32.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the state in --out, if there is one.")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile: needs a C++ compiler on a CPU.")]


@app.callback()
def train() -> None:
    """Keeps `primary` and `drafter` as subcommands, however many there are."""


@app.command()
def primary(
    out: Out,
    data: Data = "stdlib",
    tokens: Tokens = "5M",
    vocab_size: int = 4096,
    layers: int = 16,
    hidden_size: int = 256,
    intermediate_size: int = 768,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 1024,
    sequence_length: int = 512,
    batch_size: int = 16,
    learning_rate: float = 5e-3,
    embedding_learning_rate: float = 3e-3,
    muon: bool = True,
    seed: int = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    precision: Precision = "auto",
    compile: Compile = False,
    resume: Resume = True,
    checkpoint_interval_s: float = 45.0,
    quiet: bool = False,
) -> None:
    """Train a Llama-style primary from scratch, its tokenizer included."""
    from tandem_serve.models.decoder import DecoderConfig
    from tandem_serve.training.corpus import corpus_hash
    from tandem_serve.training.optimizer import OptimizerConfig
    from tandem_serve.training.primary import BatchConfig, train_primary
    from tandem_serve.training.tokenizer import END_OF_TEXT_ID
    from tandem_serve.training.trainer import TrainerConfig

    with reported():
        _set_threads(threads)
        training, held_out = _split(data)
        shape = DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden_size // heads,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            eos_token_ids=(END_OF_TEXT_ID,),
        )
        batches = BatchConfig(sequence_length, batch_size, seed)
        config = TrainerConfig(
            num_steps=max(1, parse_tokens(tokens) // (sequence_length * batch_size)),
            optimizer=OptimizerConfig(learning_rate, embedding_learning_rate, muon=muon),
            precision=precision,
            device=device,
            checkpoint_interval_s=checkpoint_interval_s,
            quiet=quiet,
        )
        details = {"data": data, "held_out": [d.name for d in held_out], "held_out_hash": corpus_hash(held_out)}
        model = train_primary(out, training, shape, batches, config, resume=resume, compiled=compile, details=details)
        typer.echo(f"primary written to {model}")


@app.command()
def drafter(
    primary: Annotated[Path, typer.Option(help="Folder of the frozen primary.")],
    out: Out,
    data: Data = "stdlib",
    tokens: Tokens = "3M",
    plain: Annotated[bool, typer.Option("--plain", help="The baseline: the same MS without taps.")] = False,
    both: Annotated[
        bool, typer.Option("--both", help="Tandem and baseline side by side, on the same batches.")
    ] = False,
    layer_map: Annotated[
        str,
        typer.Option(help="last, uniform, or each drafter layer's primary layers: 4,8, or 2+8 for several at once."),
    ] = "uniform",
    other_layer_map: Annotated[
        list[str], typer.Option(help="A further tandem drafter with that map, beside the others; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    block_lengths: Annotated[str, typer.Option(help="One length or a range, drawn per batch. 2: the paper's.")] = "1-8",
    layers: int = 2,
    hidden_size: int = 160,
    intermediate_size: int = 448,
    heads: int = 5,
    kv_heads: int = 5,
    distillation_weight: Annotated[float, typer.Option(min=0, max=1, help="Stage 2's share of ML's softmax.")] = 0.5,
    cross_entropy_share: Annotated[float, typer.Option(min=0, max=1, help="Stage 1's share of the steps.")] = 0.15,
    sampled_tokens: Annotated[str, typer.Option(help="Tokens that the primary writes as further text; 0: none.")] = "0",
    sampled_share: Annotated[float, typer.Option(min=0, max=1, help="Share of steps on the primary's text.")] = 0.5,
    start_from: Annotated[Path | None, typer.Option(help="Begin with the drafters of that finished run.")] = None,
    sequence_length: int = 512,
    batch_size: int = 4,
    learning_rate: float = 5e-3,
    embedding_learning_rate: float = 3e-3,
    muon: bool = True,
    seed: int = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    precision: Precision = "auto",
    compile: Compile = False,
    resume: Resume = True,
    checkpoint_interval_s: float = 45.0,
    quiet: bool = False,
) -> None:
    """Train drafters with the primary frozen: Tandem-CE, then Tandem-Distil."""
    from tandem_serve.training.data import parse_block_lengths
    from tandem_serve.training.drafters import PLAIN, TANDEM, DrafterConfig, train_drafters
    from tandem_serve.training.optimizer import OptimizerConfig
    from tandem_serve.training.primary import BatchConfig
    from tandem_serve.training.trainer import TrainerConfig

    with reported():
        _set_threads(threads)
        training, held_out = _split(data)
        config = DrafterConfig(
            num_layers=layers,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            layer_map=layer_map,
            other_layer_maps=tuple(other_layer_map),
            block_lengths=parse_block_lengths(block_lengths),
            kinds=(TANDEM, PLAIN) if both else (PLAIN,) if plain else (TANDEM,),
            distillation_weight=distillation_weight,
            cross_entropy_share=cross_entropy_share,
            sampled_tokens=0 if sampled_tokens == "0" else parse_tokens(sampled_tokens),
            sampled_share=sampled_share,
        )
        trainer = TrainerConfig(
            num_steps=max(1, parse_tokens(tokens) // (sequence_length * batch_size)),
            optimizer=OptimizerConfig(learning_rate, embedding_learning_rate, muon=muon),
            precision=precision,
            device=device,
            checkpoint_interval_s=checkpoint_interval_s,
            quiet=quiet,
        )
        folders = train_drafters(
            out,
            primary,
            training,
            config,
            BatchConfig(sequence_length, batch_size, seed),
            trainer,
            resume=resume,
            compiled=compile,
            start_from=start_from,
            details={"data": data, "held_out": [d.name for d in held_out]},
        )
        typer.echo("drafters written to " + ", ".join(map(str, folders)))


@app.command()
def evaluate(
    primary: Annotated[Path, typer.Option(help="Folder of the primary.")],
    drafters: Annotated[list[str], typer.Option("--drafter", help="NAME=FOLDER, as often as you like.")],
    data: Data = "stdlib",
    block_length: int = 5,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to continue.")] = 100,
    threads: Threads = 0,
) -> None:
    """Measure drafters on held-out text and on the primary's own greedy continuations; JSON to standard output."""
    from tandem_serve.training.demo import EvaluationSize, evaluate_pair

    with reported():
        _set_threads(threads)
        folders = {name: Path(folder) for name, _, folder in (d.partition("=") for d in drafters)}
        size = EvaluationSize(num_prompts=limit, block_length=block_length)
        typer.echo(json.dumps(evaluate_pair(primary, folders, _split(data)[1], size), indent=2))


@app.command()
def router(
    primary: Annotated[Path, typer.Option(help="Folder of the primary.")],
    drafter: Annotated[Path, typer.Option(help="Folder of its drafter, where router.safetensors goes.")],
    data: Data = "stdlib",
    limit: Annotated[int, typer.Option(min=4, help="Texts that the primary writes.")] = 64,
    target: Annotated[str, typer.Option(help="accept: was the draft right? tv: the paper's soft label.")] = "accept",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of every other text; the rest is greedy.")] = 0.8,
    block_length: Annotated[int, typer.Option(min=2, max=64, help="Drafts a block.")] = 12,
    threads: Threads = 0,
) -> None:
    """Train the router MLP of a drafter: run the pair, learn when its drafts are right, choose thresholds by cost."""
    from tandem_serve.training.fit_router import REPORT_FILE, RouterConfig, fit_router

    with reported():
        _set_threads(threads)
        if target not in ("accept", "tv"):
            raise ConfigError(f"--target {target}: expected accept or tv")
        config = RouterConfig(
            target="tv" if target == "tv" else "accept",
            num_texts=limit,
            temperature=temperature,
            block_length=block_length,
        )
        file = fit_router(primary, drafter, _split(data)[0], config)
        report = json.loads((drafter / REPORT_FILE).read_text("utf-8"))
        typer.echo(json.dumps(report["policies"], indent=2))
        typer.echo(f"router written to {file}")


@app.command()
def demo(
    runs: Annotated[Path, typer.Option(help="Folder of the two runs' states and logs.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Where the finished pair goes.")] = Path("models/demo"),
    primary_tokens: Tokens = "11M",
    drafter_tokens: Tokens = "5M",
    threads: Threads = 0,
    compile: Compile = True,
    quiet: bool = False,
) -> None:
    """Train the committed demo pair again, from nothing or from where a killed run stopped."""
    from tandem_serve.training.demo import assemble_demo

    primary(
        runs / "primary",
        tokens=primary_tokens,
        learning_rate=4e-3,
        threads=threads,
        compile=compile,
        quiet=quiet,
    )
    drafter(
        runs / "primary" / "model",
        runs / "drafters",
        tokens=drafter_tokens,
        both=True,
        layer_map="2+9+16",
        other_layer_map=[],
        hidden_size=192,
        intermediate_size=512,
        heads=6,
        kv_heads=6,
        sampled_tokens="400k",
        threads=threads,
        compile=compile,
        quiet=quiet,
    )
    with reported():
        report = assemble_demo(runs / "primary", runs / "drafters", out)
    typer.echo(json.dumps(report["tandem_against_plain"], indent=2))


def _split(data: str) -> tuple[list[Document], list[Document]]:
    """(training, held out) of a source. The standard library's held-out modules are fixed, so that figures compare."""
    from tandem_serve.training.corpus import STDLIB, STDLIB_HELD_OUT, read_documents, split_held_out

    return split_held_out(read_documents(data), STDLIB_HELD_OUT if data == STDLIB else None)


def _set_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def parse_tokens(text: str) -> int:
    """`500k`, `5M`, `1200000` as a number.

    Raises:
        ConfigError: for anything else.
    """
    scale = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}.get(text[-1:].lower(), 1)
    try:
        count = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"tokens {text!r}: expected a number such as 500k or 5M")
    return int(count)


if __name__ == "__main__":
    app()
